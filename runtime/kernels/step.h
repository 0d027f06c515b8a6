// What stands between the products of a layer, and products that share their activations: each one op of a decoding step.

#pragma once

#include "kernels.h"
#include "scratch.h"

namespace moedge {

// y [tokens, width] = RMSNorm(x + residual * residual_scale) * weight. Null residual: of x alone; null weight: the sum itself.
struct Norm {
  int64_t tokens, width;
  const float* x;
  const float* residual;
  const float* weight;  // [width]
  float epsilon;
  float* sum;           // x + residual * residual_scale, where there is one
  float* y;
  float residual_scale = 1.0f;

  bool changes_x() const { return weight || residual; }
};

// Takes room for what the norm gives, where its caller does not want it.
inline void take_norm(Norm* norm, Blocks* blocks) {
  if (norm->residual && !norm->sum) norm->sum = blocks->take<float>(norm->tokens * norm->width);
  if (norm->weight && !norm->y) norm->y = blocks->take<float>(norm->tokens * norm->width);
}

inline const float* input_of(const Norm& norm) {
  return norm.weight ? norm.y : norm.residual ? norm.sum : norm.x;
}

// `rows` of the norm from `first`.
void run_norm(const Norm& norm, int64_t first, int64_t rows);

// The phase that makes the activations of products: the norm's rows, each quantized while it is in the cache, or where
// there is no norm pieces of x. `more`: the same rows once more, for products of another kind.
struct Entering {
  const Kernels& kernels;
  const Norm& norm;
  Quantizing quantizing;
  const Activations* more;
  int more_bits;

  Entering(const Kernels& own, const Norm& given, int bits, const Activations& out, const Activations* also = nullptr,
           int also_bits = 0)
      : kernels(own), norm(given), quantizing{own, input_of(given), given.tokens * given.width, bits, out}, more(also),
        more_bits(also_bits) {}

  int64_t units() const { return norm.changes_x() ? norm.tokens : quantizing.units(); }
  void operator()(int64_t first, int64_t end, int64_t worker) const {
    if (!norm.changes_x()) {
      quantizing(first, end, worker);
      if (more) Quantizing{kernels, quantizing.x, quantizing.numbers, more_bits, *more}(first, end, worker);
      return;
    }
    for (int64_t row = first; row < end; ++row) {
      run_norm(norm, row, 1);
      kernels.quantize(quantizing.x + row * norm.width, quantizing.bits, row, quantizing.out);
      if (more) kernels.quantize(quantizing.x + row * norm.width, more_bits, row, *more);
    }
  }
};

constexpr int64_t kMaxMatrices = 3;

// Several linears of one input: y[i] [tokens, rows of matrix i].
struct Projections {
  const Kernels* kernels;
  Norm norm;  // without residual and weight: x goes in as it is
  int64_t count;
  Matrix matrices[kMaxMatrices];  // of one width, group and bits; one with lower codes is alone
  const float* biases[kMaxMatrices];
  float* y[kMaxMatrices];
};

size_t projections_scratch(const Projections& projections);
void run_projections(const Projections& projections, void* scratch, const Parallel& parallel);

// y = norm(x) by a matrix with lower codes, plus bias where there is one: see planes.cpp.
struct Planes {
  const Kernels* kernels;
  Norm norm;
  Matrix matrix;
  const float* bias;
  float* y;
};

size_t planes_scratch(const Planes& planes);
void run_planes(const Planes& planes, void* scratch, const Parallel& parallel);

// addend + sigmoid(share * x) * down * (silu(gate) * up): gate_up [2 I, H], the rows of gate first. x is normed; the
// sigmoid in double precision. Null addend or share: without it.
struct Mlp {
  const Kernels* kernels;
  Norm norm;
  Matrix gate_up, down;
  float* y;              // [tokens, H]
  const float* addend;   // [tokens, H]
  const float* share;    // [H]
};

size_t mlp_scratch(const Mlp& mlp);
void run_mlp(const Mlp& mlp, void* scratch, const Parallel& parallel);

// A gate over logits [E]; see export/gating/softmax_topk.py and sigmoid_topk.py, whose attributes these are.
struct Gate {
  bool sigmoid;
  int64_t experts, top_k, groups, kept_groups;
  bool normalize;
  float factor;
  const float* bias;  // [E], of a sigmoid gate, in the choice alone
};

// One token's. `scratch` [2 E + groups]. Ties go to the lower index; a logit that is no number makes every weight NaN.
void choose_experts(const Gate& gate, const float* logits, float* scratch, int64_t* experts, float* weights);

struct Router {
  const Kernels* kernels;
  Norm norm;
  Gate gate;
  const void* matrix;   // [E, H] float, or bf16 where `half`
  const float* bias;    // [E] or null
  bool half;
  float* logits;        // [tokens, E]
  int64_t* experts;     // [tokens, k]
  float* weights;
};

size_t router_scratch(const Router& router);
void run_router(const Router& router, void* scratch, const Parallel& parallel);

}  // namespace moedge
