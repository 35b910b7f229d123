// Products of rows of the row form, for every instruction set: levels of the row, or of each of its groups, looked up by
// code. Included where an instruction set is turned on, with a type BOOK<BITS> that holds the levels of one table.
//
// BOOK::COLUMNS columns are looked up at a time, and meet M rows of x.
// SHORT: groups that end within the columns that share bytes, so that every sixteen of them may have another table.

template <template <int> class BOOK, int BITS, int M, bool SHORT>
void row_of(const Matrix& w, const float* x, int64_t row, float* out) {
  using B = BOOK<BITS>;
  constexpr int width = BITS == 3 ? 2 : BITS, fields = 8 / width;
  constexpr int step = B::COLUMNS < LANES ? int(LANES) : B::COLUMNS, parts = step / B::COLUMNS;
  constexpr int64_t block = step * fields, block_bytes = block * BITS / 8;
  constexpr int chains = (M == 1 ? 4 : 2) * int(LANES) / step;  // independent sums, where there would be too few
  const uint8_t* codes = w.codes + row * w.row_bytes;
  const uint16_t* levels = w.books + row * w.book_step;
  int64_t next = w.group;  // column of the next table
  B book;
  book.read(levels);
  typename B::Floats sums[M][chains];
  for (int i = 0; i < M; i++)
    for (int c = 0; c < chains; c++) sums[i][c] = B::none();
  for (int64_t col = 0; col < w.padded; col += block, codes += block_bytes) {
    prefetch(codes, 1);
    for (int f = 0; f < fields; f++) {
      if ((SHORT || f == 0) && col + step * f == next && next < w.cols) {
        prefetch(reinterpret_cast<const uint8_t*>(levels), 2 << BITS);
        levels += 1 << BITS, next += w.group;
        book.read(levels);
      }
      for (int part = 0; part < parts; part++) {
        const int from = part * B::COLUMNS;
        const uint8_t* high = codes + 16 + 2 * f + from / 8;  // three bits: the third of each, eight in a byte
        const typename B::Floats value = book.template at<width>(codes + from, f, high);
        for (int i = 0; i < M; i++) {
          auto& sum = sums[i][(f * parts + part) % chains];
          sum = B::fma(value, B::load(x + i * w.padded + col + step * f + from), sum);
        }
      }
    }
  }
  for (int i = 0; i < M; i++) {
    for (int c = chains / 2; c; c /= 2)
      for (int k = 0; k < c; k++) sums[i][k] = B::add(sums[i][k], sums[i][k + c]);
    out[i] = B::total(sums[i][0]);
  }
}

// n rows of x are served by the functions for 4, 2 and 1.
template <template <int> class BOOK, int BITS, bool SHORT>
void row_some(const Matrix& w, const float* x, int64_t n, int64_t row, float* out) {
  if (n == 1) return row_of<BOOK, BITS, 1, SHORT>(w, x, row, out);
  if (n == 4) return row_of<BOOK, BITS, 4, SHORT>(w, x, row, out);
  row_of<BOOK, BITS, 2, SHORT>(w, x, row, out);
  if (n == 3) row_of<BOOK, BITS, 1, SHORT>(w, x + 2 * w.padded, row, out + 2);
}

template <template <int> class BOOK>
void row_float(const Matrix& w, const float* x, int64_t n, int64_t row, float* out) {
  const bool uneven = w.group % row_block_of(w.bits) != 0;
  switch (w.bits) {
    case 2: return uneven ? row_some<BOOK, 2, true>(w, x, n, row, out) : row_some<BOOK, 2, false>(w, x, n, row, out);
    case 3: return uneven ? row_some<BOOK, 3, true>(w, x, n, row, out) : row_some<BOOK, 3, false>(w, x, n, row, out);
    case 4: return uneven ? row_some<BOOK, 4, true>(w, x, n, row, out) : row_some<BOOK, 4, false>(w, x, n, row, out);
    default: return row_some<BOOK, 8, false>(w, x, n, row, out);
  }
}
