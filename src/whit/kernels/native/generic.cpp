// The kernels for processors without a version of their own.
#include "whit.h"

namespace whit {
namespace {

#include "portable.h"

const Kernels kernels = {"generic", false,       plain_tile_float, plain_tile_int8, nullptr,     plain_fixed,
                         plain_row_float, plain_row_beside, plain_unpack,    plain_decode};

}  // namespace

const Kernels* generic() { return &kernels; }

}  // namespace whit
