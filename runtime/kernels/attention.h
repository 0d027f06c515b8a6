// Attention over a KV cache: what each instruction set implements, and who uses it.
//
// The keys of a sequence are taken in blocks of kBlock, by their place in the cache. In a block a score is a chain of
// fused multiply-adds over the key's words; its share is e^(scale * score - the row's largest in this block); shares are
// added in kVector sums (by place modulo kVector), which a tree adds; an output is a chain of fused multiply-adds over
// the keys. Blocks are merged in order. That is the whole of the arithmetic: it names no vector width, no number of
// rows and no thread, so a row has the same bits alone and among others, on every path. By a cache in int8, a
// latent's or one of heads with a scale for each row, scores and outputs are of integers (`score_cached` and `weigh_cached` of Kernels), which is as independent of all that.

#pragma once

#include <stddef.h>
#include <stdint.h>

#include "kernels.h"
#include "phases.h"

namespace moedge {

constexpr int64_t kVector = 16;  // floats: the columns of a product are a multiple of it
static inline int64_t vectors_up(int64_t a) { return divide_up(a, kVector) * kVector; }
constexpr int64_t kPanelKeys = 64;
constexpr int64_t kBlock = 2 * kPanelKeys;
constexpr int64_t kFewRows = 8;  // of queries, for which keys are transposed in registers
constexpr int64_t kSomeRows = 32;  // of queries, for which keys are not transposed, but queries

enum class Element { kFloat, kHalf, kByte };  // of a cache: fp32, fp16, int8

// Rows of keys or values, `stride` elements apart.
struct Rows {
  const void* from;
  int64_t stride;
  Element element;

  Rows at(int64_t row) const {
    const int64_t size = element == Element::kFloat ? 4 : element == Element::kHalf ? 2 : 1;
    return {static_cast<const char*>(from) + row * stride * size, stride, element};
  }
  const float* floats() const { return static_cast<const float*>(from); }
};

// What some keys give to some rows: the largest score, the sum of the shares, and the values by their shares.
struct Part {
  float* largest;  // [rows]
  float* sums;     // [rows]
  float* values;   // [rows, columns]; null: nothing but zeros
  int64_t columns;

  Part from(int64_t row) const {
    return {largest + row, sums + row, values ? values + row * columns : nullptr, columns};
  }
};

struct AttentionKernels {
  // fp16 or int8 -> fp32, exact.
  void (*widen)(Element element, const void* from, int64_t count, float* to);
  // fp32 -> fp16, to the nearest, ties to even.
  void (*narrow)(const float* from, int64_t count, uint16_t* to);
  // Rows [rows, width], `stride` floats apart, rows <= kPanelKeys -> panel [width, columns], `columns` being rows or more,
  // a multiple of kVector. Rows are read up to a multiple of kVector words; columns beyond the last row hold what nobody
  // takes.
  void (*transpose)(const float* from, int64_t stride, int64_t rows, int64_t width, float* panel, int64_t columns);
  // c [rows, columns] = a [rows, depth] b [depth, columns], each a chain from 0 in the order of depth.
  void (*multiply)(const float* a, int64_t a_stride, int64_t rows, const float* b, int64_t b_stride, int64_t depth,
                   int64_t columns, float* c, int64_t c_stride);
  // Scores [rows, keys] of at most kFewRows rows, as `transpose` and `multiply` give them; as many columns are written as
  // a multiple of kVector.
  void (*score)(const float* queries, int64_t width, int64_t rows, const Rows& from, int64_t keys, float* scores,
                int64_t scores_stride);
  // As `score`, for at most kSomeRows rows, which come as `transpose` leaves them: [width, columns].
  void (*score_some)(const float* panel, int64_t columns, int64_t width, int64_t rows, const Rows& from, int64_t keys,
                     float* scores, int64_t scores_stride);
  // As `multiply`, b being values that are read as they are stored.
  void (*weigh)(const float* shares, int64_t shares_stride, int64_t rows, const Rows& values, int64_t depth,
                int64_t columns, float* c, int64_t c_stride);
  // Numbers times those of `by`.
  void (*scale)(float* numbers, int64_t count, const float* by);
  // Scores [count] -> shares, 0 outside of [from, to), with the largest of scale * score and the sum of the shares.
  // `count` is a multiple of kVector.
  void (*soften)(float* scores, int64_t count, int64_t from, int64_t to, float scale, float* largest, float* sum);
  // Rows of `part` joined to those of `into`. A row whose sum is 0 holds nothing.
  void (*merge)(const Part& into, const Part& part, int64_t rows);
};

const AttentionKernels* attention_kernels(const Kernels* kernels);  // of the same instruction set

const AttentionKernels* portable_attention();
const AttentionKernels* avx2_attention();
const AttentionKernels* avx512_attention();
const AttentionKernels* neon_attention();

// A sequence: its caches, and its rows of the run, which follow what is in the caches.
struct Lane {
  void* keys;        // [groups, capacity, room]
  void* values;      // likewise; of a latent the keys
  float* scales;     // of a latent in int8 [capacity, parts]
  float* key_scales;    // of keys in int8, where each row has its own [groups, capacity]
  float* value_scales;  // likewise
  int64_t capacity;
  int64_t past;      // rows in the caches before the run
  int64_t first, rows;  // of the run
};

// What grouped and latent attention share, once queries are rotated and the run's own rows lie in the caches.
struct Attention {
  const AttentionKernels* kernels;
  Element element;
  int64_t tokens, heads, groups;
  int64_t width, value_width;  // of a key and a value
  int64_t room;                // of a cache's row
  int64_t parts;               // scales of a cache's row: of a latent in int8; 0: none
  bool values_are_keys;        // a latent's values are the first words of its keys
  int64_t window;              // tokens that a row sees, itself included; 0: all
  float scale;
  const float* sinks;          // [heads] or null
  const Lane* lanes;
  int64_t lane_count;
  const float* queries;        // [groups, tokens, heads / groups, width]
  const Kernels* products;     // by a cache in int8, in integers; null: its rows become floats
  Queries integers;            // then in place of `queries`; a lane's first row is that of query_row
  float* out;                  // [tokens, heads, value_width]

  int64_t heads_a_group() const { return heads / groups; }
  // Whether a latent in int8 has blocks that the kernels multiply as integers.
  bool has_integer_blocks() const {
    const int64_t block = parts ? width / parts : 0;
    return (block == kMostCachedBlock || 2 * block == kMostCachedBlock) && value_width % block == 0;
  }
  // Whether heads of keys and values are multiplied as integers where they are in int8 with a scale for each row.
  bool has_integer_heads() const { return width % kMostCachedBlock == 0 && width <= kMostCachedWidth && room == width; }
  int64_t query_row(const Lane& lane, int64_t group) const {
    return group * group_rows() + (lane.first * heads_a_group() / kSideBySide + (&lane - lanes)) * kSideBySide;
  }
  int64_t query_rows() const { return groups * group_rows(); }
  int64_t group_rows() const { return (tokens * heads_a_group() / kSideBySide + lane_count) * kSideBySide; }
  bool stands_alone(const Lane& lane) const { return !parts && lane.rows * heads_a_group() <= kFewQueries; }
};

// As many threads as it is worth, memory for so many, and the run, between what comes before and what comes after it.
int64_t attention_workers(const Attention& attention);
size_t attention_scratch(const Attention& attention, int64_t workers);
void run_attention(const Attention& attention, void* scratch, const Parallel& parallel, const Phase& before,
                   const Phase& after, int64_t workers);

// Rotation of the first 2 * pairs words of a head by cos and sin [tokens, pairs].
struct Rotation {
  const float* cos;
  const float* sin;
  int64_t pairs;
  bool interleaved;
};

// An RMSNorm of parts of a row; null weight: none.
struct PartNorm {
  const float* weight;  // [width]
  int64_t width;
};

// q [tokens, heads * width], k and v [tokens, groups * width]; q and k come before their norms, of a head or of all.
struct GroupedAttention {
  Attention core;  // queries and scratch are set by the run
  const float* q;
  const float* k;
  const float* v;
  PartNorm q_norm, k_norm;
  float epsilon;
  Rotation rotation;
  const Kernels* products;
  const float* key_scales;    // of int8, where channels have them and not rows: [groups, room]
  const float* value_scales;  // likewise
};

size_t grouped_scratch(const GroupedAttention& attention);
void run_grouped(const GroupedAttention& attention, void* scratch, const Parallel& parallel);

// Matrices of all heads, [heads, rows, width]: codes of 4 or 8 bits, or floats.
struct HeadMatrices {
  Matrix codes;         // those of the first head; of floats its sizes alone
  const float* floats;  // null: codes

  const float* floats_at(int64_t head) const { return floats + head * codes.rows * codes.width; }
};

// q [tokens, heads * (nope + rope)], latent [tokens, rank], before its norm if it has one, and k_rope [tokens, rope], k_up
// [heads, nope, rank], v_up [heads, value_size, rank] -> y [tokens, heads * value_size].
struct LatentAttention {
  Attention core;
  const Kernels* products;
  const float* q;
  const float* latent;
  const float* k_rope;
  int64_t latent_stride, rope_stride;
  const float* norm;  // [rank] or null
  float epsilon;
  Rotation rotation;
  HeadMatrices k_up, v_up;
  int64_t nope, rope, rank, value_size;
  float* y;
};

size_t latent_scratch(const LatentAttention& attention);
void run_latent(const LatentAttention& attention, void* scratch, const Parallel& parallel);

}  // namespace moedge
