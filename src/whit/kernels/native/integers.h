// Integer products of a tile, for every instruction set: unsigned codes times signed x, and what makes the codes unsigned
// taken off the sums. Included where an instruction set is turned on, with a type V that names its operations.
//
// V::ROWS rows are in a register: four codes of each as bytes, one sum of each as int32 or float32.
// P parts of x: 1 for x of int8, PARTS or HALF_PARTS for x in fixed point.
// T tiles take turns, group by group: more streams from memory are under way at a time.
// GROUP: the columns of a group where they are known while compiling and make one segment, else 0. What is done once per
// group then costs as much as the products of 32 columns, so that its loops and branches are worth being rid of.

#ifndef WHIT_LAMBDA
#define WHIT_LAMBDA __attribute__((always_inline))
#endif

template <int BITS>
constexpr int quads_of = BITS & 1 ? 8 : 4;

// The codes of quad Q of a block, one byte each; `block` already points at the rows of this register.
template <class V, int BITS, int Q>
WHIT_INLINE typename V::Bytes quad(const uint8_t* block) {
  constexpr int n = quads_of<BITS>;
  if constexpr (BITS == 8) return V::load(block + Q * QUAD);
  typename V::Bytes codes = V::no_bytes();
  if constexpr (BITS & 4) {
    codes = V::template place<4, Q % 2 * 4, 0>(V::load(block + Q / 2 * QUAD));
    block += n / 2 * QUAD;
  }
  if constexpr (BITS & 2) {
    codes = V::either(codes, V::template place<2, Q % 4 * 2, (BITS & 4)>(V::load(block + Q / 4 * QUAD)));
    block += n / 4 * QUAD;
  }
  if constexpr (BITS & 1) codes = V::either(codes, V::template place<1, Q, (BITS & 6)>(V::load(block)));
  return codes;
}

template <class V, int BITS, int Q = 0>
WHIT_INLINE void quads(const uint8_t* block, typename V::Bytes* codes) {
  codes[Q] = quad<V, BITS, Q>(block);
  if constexpr (Q + 1 < quads_of<BITS>) quads<V, BITS, Q + 1>(block, codes);
}

template <class V, int BITS, int M, int P, bool TABLE, int T = 1, int GROUP = 0>
void tile_integers(const Matrix& w, const Activations& a, int64_t tile, int64_t first, float* out) {
  constexpr int n_quads = quads_of<BITS>;
  constexpr int64_t block = 4 * n_quads, block_bytes = block * LANES * BITS / 8;
  constexpr int64_t longest = P == 1 ? SEGMENT : FIXED;
  constexpr int parts_of_tile = LANES / V::ROWS, parts = T * parts_of_tile;
  constexpr bool flips = V::SIGNED && (BITS == 8 || TABLE);  // the product takes bytes from -128 to 127
  constexpr int chains = P == 1 && (M < 4 || V::ROWS == LANES) ? 2 : 1;  // independent sums, where there would be too few
  const typename V::Bytes table = V::table(w.unsigned_levels);
  static_assert(GROUP <= longest && GROUP % block == 0);
  const int64_t group = GROUP ? GROUP : w.group, segments = GROUP ? 1 : (group + longest - 1) / longest;
  const bool shifted = w.offset_kind == ZERO_POINT;
  const uint8_t* codes = w.codes + tile * w.row_bytes;
  const int8_t* x = a.q + first * a.stride * P;
  const int64_t scale_bytes = LANES * bytes_of(w.scale_type);
  const auto zero_point = [&](int64_t at, int32_t x_sum) WHIT_LAMBDA {  // what it adds to a sum of codes
    const typename V::Ints zero = V::widened(w.offset + at);
    return V::times(flips ? V::sub(zero, V::ints(128)) : zero, x_sum);
  };
  typename V::Floats y[parts][M];
  for (int h = 0; h < parts; h++)
    for (int i = 0; i < M; i++) y[h][i] = V::floats(0.0f);
  for (int64_t g = 0; g < w.groups; g++) {
    const int64_t at = (tile * w.groups + g) * LANES;
    for (int t = 0; t < T; t++) prefetch(w.scale + (tile * w.groups + g + t * w.groups) * scale_bytes, 1);
    for (int64_t s = 0; s < segments; s++) {
      const int64_t left = group - s * longest, n = left < longest ? left : longest;
      for (int h = 0; h < parts; h++) {
        const int64_t other = h / parts_of_tile, row = h % parts_of_tile * V::ROWS;
        typename V::Ints sums[M][P][chains];
        for (int i = 0; i < M; i++) {
          for (int p = 0; p < P; p++)
            for (int c = 0; c < chains; c++) sums[i][p][c] = V::ints(0);
          const int32_t* start = a.q_start + (((first + i) * w.groups + g) * segments + s) * (P == 1 ? 1 : 2);
          sums[i][0][0] = V::ints(start[0]);
          if constexpr (P > 1) sums[i][P - 1][0] = V::ints(start[1]);
        }
        const uint8_t* from = codes + other * w.row_bytes + row * 4;
        for (int64_t col = 0; col < n; col += block, from += block_bytes) {
          typename V::Bytes code[n_quads];
          if (row == 0) prefetch(from, block_bytes);
          quads<V, BITS>(from, code);
          for (int q = 0; q < n_quads; q++) {
            if constexpr (TABLE) code[q] = V::lookup(table, code[q]);
            if constexpr (flips) code[q] = V::flip(code[q]);
            for (int i = 0; i < M; i++)
              for (int p = 0; p < P; p++) {
                auto& sum = sums[i][p][q % chains];
                sum = V::template dot<(BITS < 8 && !TABLE)>(sum, code[q], x + (i * a.stride + col + 4 * q) * P + 4 * p);
              }
          }
        }
        const int64_t mine = at + other * w.groups * LANES + row;
        const typename V::Floats scale = V::load_floats(w.scale, mine, w.scale_type);
        for (int i = 0; i < M; i++) {
          const int64_t segment = ((first + i) * w.groups + g) * segments + s;
          float x_sum;
          typename V::Ints high = sums[i][0][0];
          if constexpr (P == 1) {
            if constexpr (chains == 2) high = V::add(high, sums[i][0][1]);
            if (shifted) high = V::sub(high, zero_point(mine, a.q_sums[segment]));
            x_sum = float(a.q_sums[segment]);
            y[h][i] = V::fma(scale, V::converted(high), y[h][i]);
          } else {
            constexpr float base = P == 3 ? 65536.0f : 256.0f;  // of the highest digit
            const int32_t* both = a.q_sums + 2 * segment;
            typename V::Ints low = sums[i][P - 1][0];
            if constexpr (P == 3) low = V::add(V::times_256(sums[i][1][0]), low);
            if (shifted) {
              high = V::sub(high, zero_point(mine, both[0]));
              low = V::sub(low, zero_point(mine, both[1]));
            }
            const typename V::Floats sum = V::fma(V::converted(high), V::floats(base), V::converted(low));
            x_sum = (float(both[0]) * base + float(both[1])) * a.q_scale[segment];
            y[h][i] = V::fma(V::mul(scale, V::floats(a.q_scale[segment])), sum, y[h][i]);
          }
          if (w.offset_kind == MINIMUM)
            y[h][i] = V::fma(V::load_floats(w.offset, mine, w.scale_type), V::floats(x_sum), y[h][i]);
        }
      }
      codes += n / block * block_bytes;
      x += n * P;
    }
  }
  const float unit = w.unit * w.factor;  // with a minimum both are 1
  for (int i = 0; i < M; i++)
    for (int h = 0; h < parts; h++)
      V::store(out + (i * T + h / parts_of_tile) * LANES + h % parts_of_tile * V::ROWS, V::mul(y[h][i], V::floats(unit)));
}

using Rows = void (*)(const Matrix&, const Activations&, int64_t, int64_t, float*);

template <class V, int BITS, int M, int P, int T = 1>
Rows integers_of(const Matrix& w) {
  if constexpr (BITS <= 4)
    if (w.levels) return tile_integers<V, BITS, M, P, true, T>;
  if constexpr ((M == 1 || (M == 4 && P == 1)) && (BITS <= 4 || BITS == 8)) {  // the usual ones
    if (w.group == 32) return tile_integers<V, BITS, M, P, false, T, 32>;
    if (w.group == 64) return tile_integers<V, BITS, M, P, false, T, 64>;
    if (w.group == 128) return tile_integers<V, BITS, M, P, false, T, 128>;
  }
  return tile_integers<V, BITS, M, P, false, T>;
}

// K<BITS, M>::of(w) is the function for M rows of x; n rows are served by those for 4, 2 and 1.
template <template <int, int> class K, int BITS>
void rows_of(const Matrix& w, const Activations& a, int64_t tile, int64_t first, int64_t n, float* out) {
  if (n == 1) return K<BITS, 1>::of(w)(w, a, tile, first, out);
  if (n == 4) return K<BITS, 4>::of(w)(w, a, tile, first, out);
  K<BITS, 2>::of(w)(w, a, tile, first, out);
  if (n == 3) K<BITS, 1>::of(w)(w, a, tile, first + 2, out + 2 * LANES);
}

template <template <int, int> class K>
void tiles_of(const Matrix& w, const Activations& a, int64_t tile, int64_t first, int64_t n, float* out) {
  switch (w.bits) {
    case 2: return rows_of<K, 2>(w, a, tile, first, n, out);
    case 3: return rows_of<K, 3>(w, a, tile, first, n, out);
    case 4: return rows_of<K, 4>(w, a, tile, first, n, out);
    case 5: return rows_of<K, 5>(w, a, tile, first, n, out);
    case 6: return rows_of<K, 6>(w, a, tile, first, n, out);
    case 7: return rows_of<K, 7>(w, a, tile, first, n, out);
    default: return rows_of<K, 8>(w, a, tile, first, n, out);
  }
}
