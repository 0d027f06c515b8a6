// How attention is shared among threads: rows of queries in tiles, keys in blocks.

#include <string.h>

#include "attention.h"
#include "scratch.h"

namespace moedge {

namespace {

constexpr int64_t kStep = 24;          // rows that share one look at which keys they see
constexpr int64_t kIntegerStep = 48;   // likewise by integers: a multiple of kSideBySide
static_assert(kBlock <= kCachedKeys && kIntegerStep <= kSharedRows, "kernels of integers have room for that");
constexpr int64_t kMostValues = 24576; // of a tile: its results stay in a second-level cache
// From this many tiles on each goes through its keys by itself; below, threads share out the blocks of a tile.
constexpr int64_t kManyTiles = 16;
constexpr int64_t kUnits = 64;         // units of such a round: bounds the memory for what they give
// Below this much work a second thread costs more than it saves: in multiplications, of which reading an element of a
// cache takes the time of several.
constexpr int64_t kAloneProducts = 1 << 18;
constexpr int64_t kReading = 8;

// Rows of queries of one group of heads; a row is a token and a head, heads side by side.
struct Tile {
  const Lane* lane;
  int64_t group, row, rows;
  const Tile* next = nullptr;  // whose keys are read behind these

  int64_t position(const Attention& a, int64_t r) const { return lane->past + (row + r) / a.heads_a_group(); }
  int64_t first_block(const Attention& a) const {
    return a.window ? most(0, position(a, 0) - a.window + 1) / kBlock : 0;
  }
  int64_t end_block(const Attention& a) const { return position(a, rows - 1) / kBlock + 1; }
};

int64_t step_of(const Attention& a) { return a.products ? kIntegerStep : kStep; }

int64_t tile_rows(const Attention& a) {
  const int64_t step = step_of(a), rows = kMostValues / vectors_up(a.value_width) / step * step;
  return rows < step ? step : least(rows, 4 * kStep);
}

int64_t lane_tiles(const Attention& a, const Lane& lane) {
  return divide_up(lane.rows * a.heads_a_group(), tile_rows(a)) * a.groups;
}

Tile tile_at(const Attention& a, int64_t index) {
  const Lane* lane = a.lanes;
  for (; index >= lane_tiles(a, *lane); ++lane) index -= lane_tiles(a, *lane);
  const int64_t row = index / a.groups * tile_rows(a);
  return {lane, index % a.groups, row, least(tile_rows(a), lane->rows * a.heads_a_group() - row)};
}

// What there is to do: tiles, the most rows of one, blocks of keys, work as `kAloneProducts` has it.
struct Extent {
  int64_t tiles = 0, rows = 0, blocks = 0, work = 0;
};

Extent extent_of(const Attention& a) {
  Extent all;
  for (int64_t i = 0; i < a.lane_count; ++i) {
    const Lane& lane = a.lanes[i];
    const int64_t rows = lane.rows * a.heads_a_group();
    if (rows == 0) continue;
    all.tiles += lane_tiles(a, lane);
    all.rows = most(all.rows, least(rows, tile_rows(a)));
    const int64_t end = lane.past + lane.rows;
    const int64_t begin = a.window ? most(0, lane.past - a.window + 1) : 0;
    all.blocks = most(all.blocks, divide_up(end, kBlock) - begin / kBlock);
    all.work += (lane.rows * a.heads + kReading * a.groups) * (end - begin) * (a.width + a.value_width);
  }
  return all;
}

Part take_part(const Attention& a, int64_t rows, Blocks* blocks) {
  const int64_t columns = vectors_up(a.value_width);
  float* largest = blocks->take<float>(rows);
  float* sums = blocks->take<float>(rows);
  return {largest, sums, blocks->take<float>(rows * columns), columns};
}

// Whether rows of `width` are read as they lie: by whole vectors, in fp32, or for not many queries in fp16.
bool as_they_lie(const Attention& a, int64_t width, int64_t rows) {
  return width % kVector == 0 && (a.element == Element::kFloat || (a.element == Element::kHalf && rows <= kSomeRows));
}

// One worker's memory.
struct Work {
  float* panel;   // keys [width, kBlock], in halves of kPanelKeys; of some queries [width, kPanelKeys]; of integers scores
  float* keys;    // [kBlock, vectors_up(width)], null where they are read as they lie
  float* values;  // [kBlock, vectors_up(value_width)], likewise
  float* scores;  // [rows, kBlock]
  Part part, state;
};

Work take_work(const Attention& a, int64_t rows, Blocks* blocks) {
  Work work{};
  work.panel = blocks->take<float>((a.products ? kSideBySide : a.width) * kBlock);
  if (!a.products && !as_they_lie(a, a.width, kBlock)) work.keys = blocks->take<float>(vectors_up(a.width) * kBlock);
  if (!a.products && !as_they_lie(a, a.value_width, kBlock) && !a.values_are_keys)
    work.values = blocks->take<float>(vectors_up(a.value_width) * kBlock);
  work.scores = blocks->take<float>(divide_up(rows, kSideBySide) * kSideBySide * kBlock);
  work.part = take_part(a, rows, blocks);
  work.state = take_part(a, rows, blocks);
  return work;
}

size_t element_size(Element element) { return element == Element::kFloat ? 4 : element == Element::kHalf ? 2 : 1; }

// Rows `start` to `start + count` of a cache [groups, capacity, room], the first `width` words of each.
Rows read_rows(const Attention& a, const Lane& lane, const void* cache, int64_t group, int64_t start, int64_t count,
               int64_t width, float* room) {
  const Rows stored = Rows{cache, a.room, a.element}.at(group * lane.capacity + start);
  if (!room) return stored;
  const int64_t stride = vectors_up(width);
  const char* from = static_cast<const char*>(stored.from);
  for (int64_t j = 0; j < count; ++j, from += static_cast<size_t>(a.room) * element_size(a.element)) {
    float* row = room + j * stride;
    if (a.element == Element::kFloat)
      memcpy(row, from, static_cast<size_t>(width) * sizeof(float));
    else
      a.kernels->widen(a.element, from, width, row);
    for (int64_t i = width; i < stride; ++i) row[i] = 0.0f;
    if (!a.parts) continue;
    const float* scales = lane.scales + (start + j) * a.parts;
    const int64_t block = width / a.parts;
    for (int64_t p = 0; p < a.parts; ++p)
      for (int64_t i = p * block; i < (p + 1) * block; ++i) row[i] *= scales[p];
  }
  return {room, stride, Element::kFloat};
}

// Keys that rows `r` to `r + n` of a tile see of the block that starts at `start`: up to `end`, the first row from `begin`.
struct Seen {
  int64_t begin, end;
};

Seen seen_by(const Attention& a, const Tile& tile, int64_t r, int64_t n, int64_t start) {
  return {a.window ? most(0, tile.position(a, r) - a.window + 1 - start) : 0,
          least(kBlock, tile.position(a, r + n - 1) + 1 - start)};
}

// Rows of `size` bytes from place `place` of a group on.
const char* place_in(const Tile& tile, int64_t place, const void* cache, int64_t size) {
  return static_cast<const char*>(cache) + (tile.group * tile.lane->capacity + place) * size;
}

// Keys (`values`: values) from place `place` of a tile on, and their scales.
Cached read_integers(const Attention& a, const Tile& tile, bool values, int64_t place) {
  const int64_t parts = most(1, a.parts);
  const auto codes = [&](const Tile& of, int64_t from) {
    return place_in(of, from, values ? of.lane->values : of.lane->keys, a.width);
  };
  const float* scales = a.values_are_keys ? tile.lane->scales : values ? tile.lane->value_scales : tile.lane->key_scales;
  scales = reinterpret_cast<const float*>(place_in(tile, place, scales, parts * 4));
  Cached cached{reinterpret_cast<const int8_t*>(codes(tile, place)), scales, a.width, parts};
  if (!tile.next) return cached;
  cached.end = reinterpret_cast<uintptr_t>(codes(tile, tile.position(a, tile.rows - 1) + 1));
  cached.skip = reinterpret_cast<uintptr_t>(codes(*tile.next, tile.next->first_block(a) * kBlock)) - cached.end;
  return cached;
}

void fetch_all(const void* from, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += 64) fetch(static_cast<const char*>(from) + at);
}

// The scales of a block.
void fetch_scales(const Attention& a, const Tile& tile, int64_t block) {
  const int64_t size = most(1, a.parts) * 4;
  for (const float* scales : {tile.lane->scales, tile.lane->key_scales, tile.lane->value_scales})
    if (scales) fetch_all(place_in(tile, block * kBlock, scales, size), kBlock * size);
}

// A value without a scale is no number to whoever sees it, whatever its share is.
void spoil_shares(const float* scales, int64_t count, float* shares) {
  for (int64_t k = 0; k < count; ++k)
    if (!(scales[k] == scales[k])) shares[k] = __builtin_nanf("");
}

bool all_numbers(const float* scales, int64_t count) {
  int32_t none = 0, bits = 0;
  for (int64_t k = 0; k < count; ++k) {
    memcpy(&bits, scales + k, sizeof bits);
    none |= 0x7f800000 - (bits & INT32_MAX);  // negative of NaN alone
  }
  return none >= 0;
}

// As attend_rows, of a cache in int8 and by integers.
void attend_integers(const Attention& a, const Tile& tile, int64_t r, int64_t n, int64_t start, const Work& work,
                     const Part& part) {
  const Lane& lane = *tile.lane;
  const Seen seen = seen_by(a, tile, r, n, start);
  memset(part.sums, 0, static_cast<size_t>(n) * sizeof(float));
  if (seen.begin >= seen.end) return;
  const int64_t first = seen.begin / kPanelKeys * kPanelKeys, count = seen.end - first, place = start + first;
  const int64_t columns = divide_up(count, kPanelKeys) * kPanelKeys, row = a.query_row(lane, tile.group) + tile.row + r;
  const bool grouped = !a.values_are_keys, alone = a.stands_alone(lane);
  const Cached keys = read_integers(a, tile, false, place), values = grouped ? read_integers(a, tile, true, place) : keys;
  float* scores = work.scores + r * kBlock;
  if (alone) a.products->score_alone(a.integers, row, n, keys, count, scores, kBlock);
  for (int64_t i = 0; !alone && i < n; i += kSideBySide) {
    a.products->score_cached(a.integers, row + i, keys, count, work.panel);
    for (int64_t at = 0; at < count; at += kPanelKeys)
      a.kernels->transpose(work.panel + at * kSideBySide, kSideBySide, least(kPanelKeys, count - at), kSideBySide,
                           scores + i * kBlock + at, kBlock);
  }
  const bool spoiled = grouped && !all_numbers(values.scales, count);
  for (int64_t i = 0; i < n; ++i) {
    const int64_t position = tile.position(a, r + i);
    const int64_t from = a.window ? most(0, position - a.window + 1 - place) : 0, to = least(count, position + 1 - place);
    float* shares = scores + i * kBlock;
    if (from < to)
      a.kernels->soften(shares, columns, from, to, a.scale, part.largest + i, part.sums + i);
    else
      memset(shares, 0, static_cast<size_t>(columns) * sizeof(float));
    if (spoiled && from < to) spoil_shares(values.scales + from, to - from, shares + from);
  }
  const auto weigh = alone ? a.products->weigh_alone : a.products->weigh_cached;
  weigh(scores, kBlock, n, values, count, a.value_width, part.values, part.columns);
}

// `n` rows of a tile from `r` on, over the keys of a block that starts at `start`.
void attend_rows(const Attention& a, const Tile& tile, int64_t r, int64_t n, int64_t start, const Rows& keys,
                 const Rows& values, const Work& work, const Part& part) {
  const auto [begin, end] = seen_by(a, tile, r, n, start);
  memset(part.sums, 0, static_cast<size_t>(n) * sizeof(float));
  if (begin >= end) return;
  const int64_t first = begin / kPanelKeys * kPanelKeys, columns = vectors_up(end - first);
  const int64_t row = (tile.group * a.tokens + tile.lane->first) * a.heads_a_group() + tile.row + r;
  float* scores = work.scores + r * kBlock;
  if (tile.rows <= kFewRows)
    a.kernels->score(a.queries + row * a.width, a.width, n, keys.at(first), end - first, scores + first,
                     kBlock);
  else if (tile.rows <= kSomeRows)
    a.kernels->score_some(work.panel + r, vectors_up(tile.rows), a.width, n, keys.at(first), end - first,
                          scores + first, kBlock);
  for (int64_t at = first; tile.rows > kSomeRows && at < end; at += kPanelKeys)
    a.kernels->multiply(a.queries + row * a.width, a.width, n, work.panel + at * a.width, kPanelKeys, a.width,
                        least(kPanelKeys, vectors_up(end - at)), scores + at, kBlock);
  scores += first;
  const Lane& lane = *tile.lane;
  const int64_t place = tile.group * lane.capacity + start;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t position = tile.position(a, r + i);
    const int64_t from = a.window ? most(first, position - a.window + 1 - start) : first;
    const int64_t to = least(end, position + 1 - start);
    float* seen = scores + i * kBlock + from - first;
    if (from >= to) {
      memset(scores + i * kBlock, 0, static_cast<size_t>(columns) * sizeof(float));
      continue;
    }
    if (lane.key_scales) a.kernels->scale(seen, to - from, lane.key_scales + place + from);
    a.kernels->soften(scores + i * kBlock, columns, from - first, to - first, a.scale, part.largest + i, part.sums + i);
    if (lane.value_scales) a.kernels->scale(seen, to - from, lane.value_scales + place + from);
  }
  a.kernels->weigh(scores, kBlock, n, values.at(first), end - first, part.columns, part.values, part.columns);
}

// What one block of keys gives to a tile's rows.
void attend_block(const Attention& a, const Tile& tile, int64_t block, const Work& work, const Part& part) {
  const Lane& lane = *tile.lane;
  if (a.products && block + 1 < tile.end_block(a))
    fetch_scales(a, tile, block + 1);
  else if (a.products && tile.next)
    fetch_scales(a, *tile.next, tile.next->first_block(a));
  for (int64_t r = 0; a.products && r < tile.rows; r += kIntegerStep)
    attend_integers(a, tile, r, least(kIntegerStep, tile.rows - r), block * kBlock, work, part.from(r));
  if (a.products) return;
  const int64_t start = block * kBlock, count = least(kBlock, tile.position(a, tile.rows - 1) + 1 - start);
  float* room = as_they_lie(a, a.width, tile.rows) ? nullptr : work.keys;
  const Rows keys = read_rows(a, lane, lane.keys, tile.group, start, count, a.width, room);
  const int64_t row = (tile.group * a.tokens + lane.first) * a.heads_a_group() + tile.row;
  if (tile.rows > kFewRows && tile.rows <= kSomeRows)
    a.kernels->transpose(a.queries + row * a.width, a.width, tile.rows, a.width, work.panel,
                         vectors_up(tile.rows));
  for (int64_t at = 0; tile.rows > kSomeRows && at < count; at += kPanelKeys)
    a.kernels->transpose(keys.at(at).floats(), keys.stride, least(kPanelKeys, count - at), a.width,
                         work.panel + at * a.width, kPanelKeys);
  float* more = as_they_lie(a, a.value_width, tile.rows) ? nullptr : work.values;
  const Rows values = a.values_are_keys
                          ? keys
                          : read_rows(a, lane, lane.values, tile.group, start, count, a.value_width, more);
  for (int64_t r = 0; r < tile.rows; r += kStep)
    attend_rows(a, tile, r, least(kStep, tile.rows - r), start, keys, values, work, part.from(r));
}

// A tile's rows, all keys seen, to where the results go.
void finish_tile(const Attention& a, const Tile& tile, const Part& state, const Part& sinks) {
  const int64_t heads = a.heads_a_group();
  if (a.sinks) {
    for (int64_t r = 0; r < tile.rows; ++r) {
      sinks.largest[r] = a.sinks[tile.group * heads + (tile.row + r) % heads];
      sinks.sums[r] = 1.0f;
    }
    a.kernels->merge(state, {sinks.largest, sinks.sums, nullptr, 0}, tile.rows);
  }
  for (int64_t r = 0; r < tile.rows; ++r) {
    const int64_t token = tile.lane->first + (tile.row + r) / heads;
    const int64_t head = tile.group * heads + (tile.row + r) % heads;
    float* out = a.out + (token * a.heads + head) * a.value_width;
    const float* values = state.values + r * state.columns;
    const float share = 1.0f / state.sums[r];
    for (int64_t i = 0; i < a.value_width; ++i) out[i] = values[i] * share;
  }
}

// Fetches what the kernels begin a block with: as they go on they fetch by themselves, so far ahead.
void fetch_first(const Attention& a, const Tile& tile, int64_t block) {
  const int64_t start = block * kBlock, rows = least(kBlock, tile.position(a, tile.rows - 1) + 1 - start);
  const int64_t size = a.room * static_cast<int64_t>(element_size(a.element));
  for (const void* cache : {tile.lane->keys, a.values_are_keys ? nullptr : tile.lane->values})
    if (cache) fetch_all(place_in(tile, start, cache, size), least(kAhead, rows * size));
  if (a.products) fetch_scales(a, tile, block);
}

void run_tile(const Attention& a, const Tile& tile, const Work& work) {
  memset(work.state.sums, 0, static_cast<size_t>(tile.rows) * sizeof(float));
  for (int64_t block = tile.first_block(a); block < tile.end_block(a); ++block) {
    attend_block(a, tile, block, work, work.part);
    a.kernels->merge(work.state, work.part, tile.rows);
  }
  finish_tile(a, tile, work.state, work.part);
}

// How a run is shared out.
struct Plan {
  Extent extent;
  bool split;     // blocks of a tile are shared out
  int64_t round;  // blocks of a tile in one round

  int64_t units() const { return extent.tiles * round; }
};

Plan make_plan(const Attention& a) {
  Plan plan{extent_of(a), false, 1};
  const Extent& all = plan.extent;
  plan.split = all.tiles < kManyTiles && all.blocks > 1;
  if (plan.split && all.tiles > 0) plan.round = least(all.blocks, divide_up(kUnits, all.tiles));
  return plan;
}

struct Scratch {
  Work* works;    // [workers]
  Part* parts;    // [tiles, round], of a split
  Part* states;   // [tiles]
  int64_t* done;  // [tiles]: blocks of this round
};

Scratch take_scratch(const Attention& a, const Plan& plan, int64_t workers, Blocks* blocks) {
  Scratch scratch{blocks->take<Work>(workers), nullptr, nullptr, nullptr};
  for (int64_t i = 0; i < workers; ++i) {
    const Work work = take_work(a, plan.extent.rows, blocks);
    if (blocks->base) scratch.works[i] = work;
  }
  if (!plan.split) return scratch;
  const int64_t tiles = plan.extent.tiles;
  scratch.parts = blocks->take<Part>(tiles * plan.round);
  scratch.states = blocks->take<Part>(tiles);
  scratch.done = blocks->take<int64_t>(tiles);
  for (int64_t i = 0; i < tiles * plan.round + tiles; ++i) {
    const Part part = take_part(a, plan.extent.rows, blocks);
    if (blocks->base) (i < tiles ? scratch.states[i] : scratch.parts[i - tiles]) = part;
  }
  return scratch;
}

// A block of a tile by itself, in the round that begins with block `at`; whoever does the last of a tile's merges them
// in order.
void run_unit(const Attention& a, const Plan& plan, const Scratch& s, int64_t at, int64_t unit, const Tile& tile,
              const Work& work) {
  const int64_t round = plan.round, index = unit / round;
  const int64_t first = tile.first_block(a) + at, end = tile.end_block(a), block = first + unit % round;
  if (block < end) attend_block(a, tile, block, work, s.parts[unit]);
  if (__atomic_add_fetch(s.done + index, 1, __ATOMIC_ACQ_REL) < round) return;
  s.done[index] = 0;
  for (int64_t i = 0; i < round && first + i < end; ++i)
    a.kernels->merge(s.states[index], s.parts[index * round + i], tile.rows);
  if (first + round >= end && first < end) finish_tile(a, tile, s.states[index], work.part);
}

}  // namespace

int64_t attention_workers(const Attention& a) {
  const Plan plan = make_plan(a);
  return plan.extent.work > kAloneProducts ? count_workers(plan.units()) : 1;
}

size_t attention_scratch(const Attention& attention, int64_t workers) {
  Blocks blocks{nullptr};
  take_scratch(attention, make_plan(attention), workers, &blocks);
  return blocks.used;
}

// Rounds of some blocks of every tile, or one of whole tiles.
void run_attention(const Attention& a, void* scratch, const Parallel& parallel, const Phase& before,
                   const Phase& after, int64_t workers) {
  const Plan plan = make_plan(a);
  Blocks blocks{static_cast<char*>(scratch)};
  const Scratch s = take_scratch(a, plan, workers, &blocks);
  const int64_t rounds = plan.split ? divide_up(plan.extent.blocks, plan.round) : 1;
  for (int64_t i = 0; plan.split && i < plan.extent.tiles; ++i) {
    s.done[i] = 0;
    memset(s.states[i].sums, 0, static_cast<size_t>(plan.extent.rows) * sizeof(float));
  }
  for (int64_t r = 0; r < rounds; ++r) {
    const int64_t at = r * plan.round;
    const auto attend = [&](int64_t first, int64_t end, int64_t worker) {
      Tile tile{}, next = tile_at(a, first / plan.round);
      for (int64_t unit = first; unit < end; ++unit) {
        if (unit == first || unit % plan.round == 0) {
          const int64_t behind = unit / plan.round + 1;
          tile = next;
          if (behind < plan.extent.tiles) {
            next = tile_at(a, behind);
            tile.next = &next;
          }
        }
        if (unit == first || !a.products)  // later ones are fetched by those before them
          fetch_first(a, tile, tile.first_block(a) + (plan.split ? at + unit % plan.round : 0));
        if (plan.split)
          run_unit(a, plan, s, at, unit, tile, s.works[worker]);
        else
          run_tile(a, tile, s.works[worker]);
      }
    };
    Phase first = before, last = after;
    if (r > 0) first.units = 0;
    if (r + 1 < rounds) last.units = 0;
    run_phases(parallel, {first, phase(plan.units(), attend), last}, workers);
  }
}

}  // namespace moedge
