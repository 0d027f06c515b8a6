// Products of attention by a cache in int8, in integers: see `score_cached` and `weigh_cached` of Kernels.

#pragma once

namespace {

using moedge::Cached;
using moedge::kCachedKeys;
using moedge::kDigit;
using moedge::kMostQuery;
using moedge::kMostShare;
using moedge::kSharedRows;
using moedge::kSideBySide;
using moedge::Queries;

constexpr float kLeastShare = 1e-34f;  // kMostShare divided by it is a number
constexpr int64_t kPieces = 2 * kSideBySide;  // numbers that loops take at once: they come in multiples of it

// The scale that makes an integer `code` of the largest magnitude; NaN of what is none, or infinite.
inline float code_scale(int32_t largest, float code) {
  return largest < 0x7f800000 ? float_of(largest) * (1.0f / code) : float_of(0x7fc00000);
}

// Numbers times the factor, rounded to integers. What is no number gives what nobody takes.
template <class S>
inline void round_all(const float* x, int64_t count, float factor, int32_t* codes) {
  for (int64_t i = 0; i < count; i += S::lanes) {
    const typename S::Float shifted = S::add(S::multiply(S::load_some(x + i), S::floats(factor)), S::floats(kRound));
    S::store_ints(codes + i, S::subtract(S::as_ints(shifted), S::ints(bits_of(kRound))));
  }
}

template <class S>
void put_query(const float* x, int64_t row, bool alone, const Queries& out) {
  const int64_t block = out.width / out.parts & -kPieces, group = row / kSideBySide, side = row % kSideBySide;
  const int64_t next = alone ? 1 : 2 * kSideBySide, lower_words = alone ? out.width / 4 : kSideBySide;
  int32_t* words = out.words + (alone ? row * out.width / 2 : group * out.width / 4 * 2 * kSideBySide + side);
  for (int64_t b = 0; b < out.parts; ++b, x += block) {
    typename S::Int most = S::ints(0);  // magnitudes' bits order as they do, infinities and NaN last
    for (int64_t i = 0; i < block; i += S::lanes)
      most = S::larger(most, S::magnitude(S::as_ints(S::load_some(x + i))));
    const int32_t largest = S::largest(most);
    const bool nothing = largest >= 0x7f800000 || float_of(largest) < 1e-30f;
    int8_t upper[moedge::kMostCachedWidth], lower[moedge::kMostCachedWidth];
    alignas(64) int32_t codes[moedge::kMostCachedWidth];
    int32_t sum = 0;
    if (nothing)
      memset(codes, 0, static_cast<size_t>(block) * sizeof *codes);
    else
      round_all<S>(x, block, kMostQuery / float_of(largest), codes);
    for (int64_t i = 0; i < block; ++i) {
      const int32_t digit = (codes[i] + kDigit / 2) >> 7;
      upper[i] = static_cast<int8_t>(digit);
      lower[i] = static_cast<int8_t>(codes[i] - digit * kDigit);
      sum += codes[i];
    }
#pragma GCC unroll 1
    for (int64_t i = 0; i < block; i += 4, words += next) {
      words[0] = word_at(upper + i);
      words[lower_words] = word_at(lower + i);
    }
    const int64_t place = (group * out.parts + b) * kSideBySide + side;
    out.scales[place] = nothing && largest < 0x7f800000 ? 0.0f : code_scale(largest, kMostQuery);
    out.sums[place] = sum;
  }
}

// Lanes are queries; one key's words after the other are multiplied with all of them, K keys from `first` on side by side.
// `known`: a key's width, in blocks of kMostCachedBlock, or 0.
template <class S, int K, int64_t known>
__attribute__((noinline)) void score_keys(const Queries& queries, int64_t group, int64_t half, const Cached& cached,
                                          int64_t first, float* out) {
  using Int = typename S::Int;
  using Float = typename S::Float;
  const int64_t width = known ? known : cached.width, parts = known ? known / moedge::kMostCachedBlock : cached.parts;
  const int64_t block = known ? moedge::kMostCachedBlock : width / parts;
  const int32_t* own = queries.words + group * width / 4 * 2 * kSideBySide + half;
  const float* own_scales = queries.scales + group * parts * kSideBySide + half;
  const int32_t* own_sums = queries.sums + group * parts * kSideBySide + half;
  const int8_t *keys = cached.codes + first * width, *ahead = cached.ahead(keys);
  const float* scales = cached.scales + first * parts;
  Float total[K];
#pragma GCC unroll 8
  for (int k = 0; k < K; ++k) total[k] = S::floats(0.0f);
  for (int64_t b = 0; b < parts; ++b, keys += block, ahead += block) {
    Int upper[K], lower[K];
    const Int less = S::multiply(S::load_ints(own_sums + b * kSideBySide), S::ints(-S::cached_middle));
#pragma GCC unroll 8
    for (int k = 0; k < K; ++k) {
      upper[k] = S::ints(0);
      lower[k] = less;
      for (int64_t at = 0; at < block; at += 64) fetch(ahead + k * width + at);
    }
    for (int64_t at = 0; at < block; at += 4, own += 2 * kSideBySide) {
      const Int first_digits = S::load_bytes(own), last_digits = S::load_bytes(own + kSideBySide);
#pragma GCC unroll 8
      for (int k = 0; k < K; ++k) {
        const Int codes = S::cached_word(keys + k * width + at);
        upper[k] = S::template dot<6>(upper[k], codes, first_digits);
        lower[k] = S::template dot<6>(lower[k], codes, last_digits);
      }
    }
    const Float scale = S::load_some(own_scales + b * kSideBySide);
#pragma GCC unroll 8
    for (int k = 0; k < K; ++k) {
      const Int sum = S::add(S::multiply(upper[k], S::ints(kDigit)), lower[k]);
      total[k] = S::fused(S::to_floats(sum), S::multiply(scale, S::floats(scales[k * parts + b])), total[k]);
    }
  }
#pragma GCC unroll 8
  for (int k = 0; k < K; ++k) S::store_floats(out + k * kSideBySide, total[k]);
}

template <class S>
void score_cached(const Queries& queries, int64_t row, const Cached& cached, int64_t keys, float* scores) {
  constexpr int64_t usual = 576, K = S::keys;  // DeepSeek's latents
  const bool known = cached.width == usual && cached.parts * moedge::kMostCachedBlock == usual;
  const bool few = keys < K;
  const auto run = few ? score_keys<S, 1, 0> : known ? score_keys<S, K, usual> : score_keys<S, K, 0>;
  const int64_t step = few ? 1 : K;
  for (int64_t key = 0; key < keys; key += step) {
    const int64_t first = least(key, keys - step);  // at the end some keys once more
    for (int64_t half = 0; half < kSideBySide; half += S::lanes)
      run(queries, row / kSideBySide, half, cached, first, scores + first * kSideBySide + half);
  }
}

// Lanes are columns, which are added up for as many keys as a vector has lanes. `known`: the width, or 0.
template <class S, int64_t known>
void score_by_columns(const Queries& queries, int64_t row, int64_t rows, const Cached& cached, int64_t keys, float* scores,
                      int64_t stride) {
  using Int = typename S::Int;
  constexpr int64_t lanes = S::lanes, bytes = 4 * lanes;
  const int64_t width = known ? known : cached.width;
  for (int64_t key = 0; key < keys; key += lanes) {
    const int8_t* codes[lanes];
    float scales[lanes];
    const int8_t* ahead = cached.ahead(cached.codes + key * width);
    for (int64_t at = 0; at < lanes * width; at += 64) fetch(ahead + at);
    for (int64_t i = 0; i < lanes; ++i) {
      const int64_t place = least(key + i, keys - 1);
      codes[i] = cached.codes + place * width;
      scales[i] = cached.scales[place];
    }
    for (int64_t m = row; m < row + rows; ++m) {
      const int8_t *upper = reinterpret_cast<const int8_t*>(queries.words) + 2 * m * width, *lower = upper + width;
      Int sums[lanes], digits[2][known ? known / bytes : 1];
      for (int64_t v = 0; v < known / bytes; ++v) {
        digits[0][v] = S::load_bytes(upper + v * bytes);
        digits[1][v] = S::load_bytes(lower + v * bytes);
      }
#pragma GCC unroll 16
      for (int64_t i = 0; i < lanes; ++i) {
        Int first = S::ints(0), last = S::ints(0);
        for (int64_t at = 0; at < width; at += bytes) {
          const Int own = S::cached(S::load_bytes(codes[i] + at));
          first = S::template dot<6>(first, own, known ? digits[0][at / bytes] : S::load_bytes(upper + at));
          last = S::template dot<6>(last, own, known ? digits[1][at / bytes] : S::load_bytes(lower + at));
        }
        sums[i] = S::add(S::multiply(first, S::ints(kDigit)), last);
      }
      const Int all = S::subtract(S::sums(sums), S::ints(S::cached_middle * queries.sums[m]));
      const typename S::Float scale = S::multiply(S::floats(queries.scales[m]), S::load_some(scales));
      S::store_ints(reinterpret_cast<int32_t*>(scores + (m - row) * stride + key),
                    S::as_ints(S::fused(S::to_floats(all), scale, S::floats(0.0f))));
    }
  }
}

template <class S>
void score_alone(const Queries& queries, int64_t row, int64_t rows, const Cached& cached, int64_t keys, float* scores,
                 int64_t stride) {
  constexpr int64_t usual = 128;
  const auto run = cached.width == usual ? score_by_columns<S, usual> : score_by_columns<S, 0>;
  run(queries, row, rows, cached, keys, scores, stride);
}

// Shares by the scales of their keys' blocks as integers `codes` [keys]. Returns the scale.
template <class S>
float round_shares(const float* shares, const float* scales, int64_t keys, int32_t* codes) {
  alignas(64) float products[kCachedKeys];
  typename S::Int most = S::ints(0);
  for (int64_t k = 0; k < keys; k += S::lanes) {
    const typename S::Float product = S::multiply(S::load_some(shares + k), S::load_some(scales + k));
    S::store_floats(products + k, product);
    most = S::larger(most, S::as_ints(product));
  }
  const int32_t largest = S::largest(most);
  const bool finite = largest < 0x7f800000, nothing = finite && float_of(largest) < kLeastShare;
  if (finite && !nothing)
    round_all<S>(products, keys, kMostShare / float_of(largest), codes);
  else
    memset(codes, 0, static_cast<size_t>(keys) * sizeof *codes);
  return nothing ? 0.0f : code_scale(largest, kMostShare);
}

// Of keys 16 apart: bytes of the upper digits and of the lower ones.
template <class S>
inline void store_digits(const int32_t* codes, int32_t* upper, int32_t* lower) {
  const typename S::Int byte = S::ints(256);
  typename S::Int high = S::ints(0), low = S::ints(0);
  for (int t = 3; t >= 0; --t) {
    const typename S::Int code = S::load_ints(codes + t * kSideBySide), digits = S::upper_digits(code);
    high = S::add(S::multiply(high, byte), digits);
    low = S::add(S::multiply(low, byte), S::subtract(code, S::multiply(digits, S::ints(kDigit))));
  }
  S::store_ints(upper, high);
  S::store_ints(lower, low);
}

// Integers of shares, `together` of them in a word; of four there are two, `apart` from each other.
template <class S, int64_t together>
inline void pack_shares(const int32_t* codes, int64_t keys, int32_t* words, int64_t apart) {
  constexpr int64_t side = kSideBySide;
  for (int64_t k = 0; k < keys; k += together * side)
    for (int64_t i = 0; i < side; i += S::lanes, words += S::lanes) {
      const int32_t* from = codes + k + i;
      if constexpr (together == 2)
        S::store_ints(words, S::add(S::load_ints(from), S::upper_half(S::load_ints(from + side))));
      else
        store_digits<S>(from, words, words + apart);
    }
}

// A block's scales of `known` keys, up to kCachedKeys. Who sees a key without one gets no number by its score: here it is 0.
template <class S>
inline void copy_scales(const float* from, int64_t step, int64_t known, float* scales) {
  int64_t k = 0;
  typename S::Int most = S::ints(0);
  for (; step == 1 && k + S::lanes <= known; k += S::lanes) {
    const typename S::Float some = S::load_some(from + k);
    S::store_floats(scales + k, some);
    most = S::larger(most, S::magnitude(S::as_ints(some)));
  }
  if (S::largest(most) > 0x7f800000) k = 0;  // one is no number: one by one
#pragma GCC novector
  for (; k < known; ++k) scales[k] = from[k * step] == from[k * step] ? from[k * step] : 0.0f;
  for (; k < kCachedKeys; ++k) scales[k] = 0.0f;
}

// Codes of a block's columns as the words of shares want them: [keys / together][block]. Keys beyond the last one are
// that one again: their shares are 0.
template <class S>
void turn_values(const Cached& cached, int64_t first, int64_t known, int64_t keys, int64_t block, int32_t* panel) {
  constexpr int64_t together = S::together, side = kSideBySide;
  for (int64_t k = 0; k < keys; k += together * side)
    for (int64_t i = 0; i < side; ++i, panel += block) {
      const int8_t* row[together];
      for (int64_t t = 0; t < together; ++t) {
        row[t] = cached.codes + least(k + t * side + i, known - 1) * cached.width + first;
        fetch(cached.ahead(row[t]));
      }
      S::turn_columns(row, block, panel);
    }
}

// M rows of shares by a panel.
template <class S, int M>
__attribute__((noinline)) void weigh_rows(const int32_t* words, const float* scales, int64_t rows, const int32_t* panel,
                                          int64_t block, int64_t steps, float* out, int64_t stride) {
  using Int = typename S::Int;
  constexpr int digits = S::together / 2, vectors = 2;
  for (int64_t at = 0; at < block; at += vectors * S::lanes) {
    Int sum[M][digits][vectors];
    for (int m = 0; m < M; ++m)
      for (int d = 0; d < digits; ++d)
        for (int v = 0; v < vectors; ++v) sum[m][d][v] = S::ints(0);
    for (int64_t s = 0; s < steps; ++s) {
      Int column[vectors];
      for (int v = 0; v < vectors; ++v) column[v] = S::load_bytes(panel + s * block + at + v * S::lanes);
      for (int m = 0; m < M; ++m)
        for (int d = 0; d < digits; ++d) {
          const Int share = S::ints(words[(m * digits + d) * (kCachedKeys / S::together) + s]);
          for (int v = 0; v < vectors; ++v) sum[m][d][v] = S::dot_shares(sum[m][d][v], column[v], share);
        }
    }
    for (int m = 0; m < M && m < rows; ++m)
      for (int v = 0; v < vectors; ++v) {
        Int all = sum[m][0][v];
        if (digits == 2) all = S::add(S::multiply(all, S::ints(kDigit)), sum[m][digits - 1][v]);
        const typename S::Float value = S::multiply(S::to_floats(all), S::floats(scales[m]));
        S::store_ints(reinterpret_cast<int32_t*>(out + m * stride + at + v * S::lanes), S::as_ints(value));
      }
  }
}

template <class S>
void weigh_cached(const float* shares, int64_t shares_stride, int64_t rows, const Cached& cached, int64_t keys,
                  int64_t columns, float* out, int64_t stride) {
  constexpr int M = S::share_rows;
  constexpr int64_t together = S::together, most = (kSharedRows + M - 1) / M * M, each = kCachedKeys / 2;
  const int64_t block = least(cached.width / cached.parts, moedge::kMostCachedBlock);
  const int64_t some = together * kSideBySide, whole = divide_up(keys, some) * some;
  alignas(64) int32_t panel[kCachedKeys / together * moedge::kMostCachedBlock];
  alignas(64) int32_t words[most * each], codes[kCachedKeys];
  alignas(64) float scales[kCachedKeys];
  float own[most];
  for (int64_t g = 0; g * block < columns; ++g) {
    const bool changed = g == 0 || cached.parts > 1;
    if (changed) copy_scales<S>(cached.scales + g, cached.parts, keys, scales);
    for (int64_t r = 0; changed && r < rows; ++r) {
      own[r] = round_shares<S>(shares + r * shares_stride, scales, whole, codes);
      pack_shares<S, together>(codes, whole, words + r * each, kCachedKeys / together);
    }
    turn_values<S>(cached, g * block, keys, whole, block, panel);
    for (int64_t r = 0; r < rows; r += M)
      weigh_rows<S, M>(words + r * each, own + r, rows - r, panel, block, whole / together, out + r * stride + g * block,
                       stride);
  }
}

// M rows by four keys' bytes, which are turned in registers and used there. `fetches`: those ahead come.
template <class S, int M>
void weigh_turned(const int32_t* words, const float* scales, const Cached& cached, int64_t keys, int64_t columns,
                  bool fetches, float* out, int64_t stride) {
  using Int = typename S::Int;
  constexpr int64_t lanes = S::lanes, bytes = 4 * lanes, side = kSideBySide, half = kCachedKeys / 4;
  alignas(64) float values[bytes];
  for (int64_t at = 0; at < columns; at += bytes) {
    Int upper[M][4], lower[M][4];
    for (int m = 0; m < M; ++m)
      for (int v = 0; v < 4; ++v) upper[m][v] = lower[m][v] = S::ints(0);
    const int32_t* own = words;
    for (int64_t first = 0; first < keys; first += 4 * side) {
      const int8_t* codes = cached.codes + first * cached.width + at;
      const int8_t* ahead = cached.ahead(codes);  // each key's is as far ahead as the others'
      for (int64_t w = 0; w < side; ++w, ++own) {
        Int column[4];
        for (int64_t t = 0; t < 4; ++t) {
          const int64_t key = w + t * side;
          column[t] = S::load_bytes(codes + least(key, keys - first - 1) * cached.width);
          if (fetches && at % 64 == 0) fetch(ahead + key * cached.width);
        }
        S::turn(column);
        for (int m = 0; m < M; ++m) {
          const Int high = S::ints(own[m * 2 * half]), low = S::ints(own[(2 * m + 1) * half]);
          for (int v = 0; v < 4; ++v) {
            upper[m][v] = S::template dot<4>(upper[m][v], high, column[v]);
            lower[m][v] = S::template dot<4>(lower[m][v], low, column[v]);
          }
        }
      }
    }
    for (int m = 0; m < M; ++m) {
      for (int v = 0; v < 4; ++v) {
        const Int all = S::add(S::multiply(upper[m][v], S::ints(kDigit)), lower[m][v]);
        S::store_floats(values + v * lanes, S::multiply(S::to_floats(all), S::floats(scales[m])));
      }
      for (int64_t c = 0; c < bytes; c += 4)
        memcpy(out + m * stride + at + c, values + c % 16 / 4 * lanes + c / 16 * 4, 4 * sizeof *out);
    }
  }
}

template <class S>
void weigh_alone(const float* shares, int64_t shares_stride, int64_t rows, const Cached& cached, int64_t keys,
                 int64_t columns, float* out, int64_t stride) {
  constexpr int64_t four = 4 * kSideBySide, each = kCachedKeys / 2;
  const int64_t whole = divide_up(keys, four) * four;
  alignas(64) int32_t codes[kCachedKeys], words[S::alone_rows * each];
  alignas(64) float scales[kCachedKeys];
  float own[S::alone_rows];
  copy_scales<S>(cached.scales, 1, keys, scales);
  for (int64_t r = 0; r < rows; r += S::alone_rows) {
    const int64_t some = least(S::alone_rows, rows - r);
    for (int64_t m = 0; m < some; ++m) {
      own[m] = round_shares<S>(shares + (r + m) * shares_stride, scales, whole, codes);
      pack_shares<S, 4>(codes, whole, words + m * each, each / 2);
    }
    const auto run = some == 1 ? weigh_turned<S, 1> : weigh_turned<S, S::alone_rows>;
    run(words, own, cached, keys, columns, r == 0, out + r * stride, stride);
  }
}

}  // namespace
