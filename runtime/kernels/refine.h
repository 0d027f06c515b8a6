// What the lower two bits of 6-bit codes add to chosen rows of one token's product: see planes.cpp.

#pragma once

namespace {

constexpr int64_t kPart = 16;  // columns of four bytes of lower codes: groups are of whole parts

// The integers of groups `from` to `from + count` of one row, count <= lanes.
template <class S>
inline void sum_lower(const Matrix& matrix, int64_t row, int64_t from, int64_t count, const Activations& x, int32_t* out) {
  constexpr int64_t lanes = S::lanes, chunk = 4 * lanes;
  alignas(64) int32_t parts[lanes * kMaxGroup / kPart + lanes];  // and room to read on
  alignas(64) uint8_t end[chunk] = {};
  const int64_t bytes = count * matrix.group / 4, plane = x.width / 4, first = from * matrix.group / 4;
  const uint8_t* codes = matrix.lower + row * (matrix.width / 4) + first;
  const int8_t* own = x.codes + first;
  for (int64_t at = 0; at < bytes; at += chunk) {
    const uint8_t* source = codes + at;
    if (bytes - at < chunk) source = static_cast<const uint8_t*>(memcpy(end, source, static_cast<size_t>(bytes - at)));
    const typename S::Int word = S::load_bytes(source);
    typename S::Int sum = S::ints(0);
    sum = S::template dot<4>(sum, S::template pairs<0>(word), S::load_bytes(own + at));
    sum = S::template dot<4>(sum, S::template pairs<1>(word), S::load_bytes(own + plane + at));
    sum = S::template dot<4>(sum, S::template pairs<2>(word), S::load_bytes(own + 2 * plane + at));
    sum = S::template dot<4>(sum, S::template pairs<3>(word), S::load_bytes(own + 3 * plane + at));
    S::store_ints(parts + at / 4, sum);
  }
  // Each group's are turned to a lane of its own. What lanes beyond the last group get nobody takes.
  const int64_t each = matrix.group / kPart;
  const uint8_t* own_parts[lanes];
  for (int64_t b = 0; b < lanes; ++b) own_parts[b] = reinterpret_cast<const uint8_t*>(parts + least(b, count - 1) * each);
  typename S::Int all = S::ints(0);
  for (int64_t at = 0; at < each; at += lanes) {
    typename S::Int turned[lanes];
    load_transposed<S>(own_parts, 4 * at, turned);
    for (int64_t i = 0; i < least(lanes, each - at); ++i) all = S::add(all, turned[i]);
  }
  S::store_ints(out, all);
}

template <class S>
void refine(const Matrix& matrix, const int64_t* rows, int64_t count, const Activations& x, float* y) {
  constexpr int64_t lanes = S::lanes;
  alignas(64) int32_t integers[lanes * lanes] = {};
  for (int64_t done = 0; done < count; done += lanes) {
    const int64_t some = least(lanes, count - done);
    alignas(64) float totals[lanes];
    int64_t own[lanes];  // beyond the last row: that row again, whose results nobody takes
    for (int64_t r = 0; r < lanes; ++r) {
      own[r] = rows[done + least(r, some - 1)];
      totals[r] = y[own[r]];
    }
    typename S::Float total = S::load_floats(totals);
    for (int64_t from = 0; from < x.groups; from += lanes) {
      const int64_t groups = least(lanes, x.groups - from);
      for (int64_t r = 0; r < some; ++r) sum_lower<S>(matrix, own[r], from, groups, x, integers + r * lanes);
      total = add_some<S>(matrix, own, from, groups, integers, lanes, kLowerZero, x, total);
    }
    S::store_floats(totals, total);
    for (int64_t r = 0; r < some; ++r) y[own[r]] = totals[r];
  }
}

}  // namespace
