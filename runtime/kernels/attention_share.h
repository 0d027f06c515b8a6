// What the two halves of attention share.

#pragma once

#include "attention.h"
#include "scratch.h"

namespace moedge {

inline int64_t vectors_up(int64_t a) { return divide_up(a, kVector) * kVector; }

}  // namespace moedge
