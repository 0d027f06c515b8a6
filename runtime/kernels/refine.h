// What the lower two bits of 6-bit codes add to chosen rows of one token's product: see planes.cpp.

#pragma once

namespace {

constexpr int64_t kPart = 16;  // columns of four bytes of lower codes: groups are of whole parts

// A vector of a row's lower codes. Behind the row's end are the next one's.
template <class S>
inline typename S::Int load_lower(const Matrix& matrix, int64_t row, int64_t at) {
  const int64_t bytes = matrix.width / 4, place = row * bytes + at, left = matrix.rows * bytes - place;
  if (left >= 4 * S::lanes) return S::load_bytes(matrix.lower + place);
  alignas(64) uint8_t last[4 * S::lanes] = {};
  return S::load_bytes(memcpy(last, matrix.lower + place, static_cast<size_t>(left)));
}

// What the groups of `lanes` rows add to their results so far.
template <class S>
inline typename S::Float refine_rows(const Matrix& matrix, const int64_t* rows, const Activations& x,
                                     typename S::Float total) {
  constexpr int64_t lanes = S::lanes;
  const int64_t parts = matrix.group / kPart;
  Groups<S> groups;
  typename S::Int sum = S::ints(0), read[lanes], each[lanes];
  for (int64_t at = 0, group = 0, held = 0; at < matrix.width / 4; at += 4 * lanes) {
    typename S::Int own[4];  // zeros behind the row's end
    for (int64_t i = 0; i < 4; ++i) own[i] = S::load_bytes(x.codes + i * (x.width / 4) + at);
#pragma GCC unroll 16
    for (int64_t r = 0; r < lanes; ++r) {
      const typename S::Int word = load_lower<S>(matrix, rows[r], at);
      read[r] = S::template dot<4>(S::ints(0), S::template pairs<0>(word), own[0]);
      read[r] = S::template dot<4>(read[r], S::template pairs<1>(word), own[1]);
      read[r] = S::template dot<4>(read[r], S::template pairs<2>(word), own[2]);
      read[r] = S::template dot<4>(read[r], S::template pairs<3>(word), own[3]);
    }
    S::transpose(read, each);
    for (int64_t i = 0; i < lanes && group < x.groups; ++i) {
      sum = S::add(sum, each[i]);
      if (++held < parts) continue;
      const int64_t among = group % lanes;
      if (among == 0) load_groups<S>(matrix, rows, group, least(lanes, x.groups - group), &groups);
      total = add_group<S>(sum, S::load_floats(groups.scales + among * lanes), S::ints(kLowerZero), x.sums[group],
                           x.scales[group], total);
      sum = S::ints(0);
      held = 0;
      ++group;
    }
  }
  return total;
}

template <class S>
void refine(const Matrix& matrix, const int64_t* rows, int64_t count, const Activations& x, float* y) {
  constexpr int64_t lanes = S::lanes;
  for (int64_t done = 0; done < count; done += lanes) {
    const int64_t some = least(lanes, count - done);
    alignas(64) float totals[lanes];
    int64_t own[lanes];  // beyond the last row: that row again, whose results nobody takes
    for (int64_t r = 0; r < lanes; ++r) {
      own[r] = rows[done + least(r, some - 1)];
      totals[r] = y[own[r]];
    }
    S::store_floats(totals, refine_rows<S>(matrix, own, x, S::load_floats(totals)));
    for (int64_t r = 0; r < some; ++r) y[own[r]] = totals[r];
  }
}

}  // namespace
