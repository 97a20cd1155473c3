// What follows h in every family, and its gradient:
//
//   y = residual + keep·act(h)      or  residual + keep·a·gate(b), (a, b) the halves of h
//   g = act'(h)·keep·dy
//
// `Input` says how a family makes h. Its members work on packs of vectors: load(x, i, n) gives
// what h is made of at column i on, affine(x, i, n) makes h of it, and rescale(y, i, n) multiplies
// by what the family multiplies its output by, if rescales(); plain() gives the row if it is h
// itself, else null, and gives_x() whether x is asked for by who takes the gradient. `ahead` is the
// row of z that is asked for while this one is worked on.
#pragma once

#include "pack.h"
#include "stages.h"
// After pack.h: its templates need the functions of the vector type declared.
#include "../activation.h"

namespace fused::FUSED_TARGET {

// Elements of a row that are staged together; their copies stay in the first-level cache.
constexpr int64_t kSegment = 256;
static_assert(kSegment % kRandomBlock == 0);

// Where a row of the output is, and what is added to it; the counter of its first dropout numbers.
template <class T>
struct OutputRow {
  T* y;
  const T* residual;  // may be null
  uint64_t counter;
};

template <class T>
struct GradientRow {
  const T *dy, *ahead;  // ahead: as Input::ahead
  uint64_t counter;
  T* dz = nullptr;     // not null: g is dz, and nothing else is made of it
  T* dgate = nullptr;  // where the gates' part of it is
};

// How none and relu are compiled.
template <class T>
constexpr Through kCheapest = std::is_same_v<T, double> ? Through::stage : Through::comparison;

template <class T, Through kThrough>
struct Epilogue : Packs<T> {
  using Base = Packs<T>;
  using Base::each;
  using typename Base::C;
  using typename Base::V;
  static constexpr bool kGated = kThrough == Through::gate;
  static constexpr bool kCompares = kThrough == Through::comparison;
  static constexpr bool kInside = kThrough != Through::stage && !kGated;
  using Inside = std::conditional_t<kThrough == Through::gelu, Gelu, Silu>;
  using Parameters = ActivationParameters<V>;
  static constexpr int64_t kHalves = kGated ? 2 : 1;

  explicit Epilogue(const Stages& given)
      : stages(given),
        compares(given.alpha == given.alpha),
        alpha(broadcast<V>(given.alpha)),
        scale(Base::dropout_scale(given.threshold)),
        threshold(given.threshold),
        streaming(given.streaming),
        keys(given.seed) {}

  // Multiplies a pack by dropout's factors.
  template <int kCount>
  FUSED_INLINE void drop(V (&values)[kCount], int64_t start, uint64_t counter) {
    if (!threshold) return;
    const int first = static_cast<int>(start % kRandomBlock);
    if (first == 0) keep.draw(keys, counter + start / kElementsPerCounter, threshold);
    each(values, start, [&](int k, int64_t) FUSED_INLINE {
      values[k] *= keep.factor(first + k * Base::kLanes, scale);
    });
  }

  // From act(h) on.
  template <int kCount, class N, class Input>
  FUSED_INLINE void finish(V (&y)[kCount], int64_t start, N n, const Input& input,
                           const OutputRow<T>& row) {
    drop(y, start, row.counter);
    input.rescale(y, start, n);
    Base::add(y, row.residual, start, n);
    each(y, start,
         [&](int k, int64_t i) FUSED_INLINE { Base::store_output(row.y + i, y[k], n, streaming); });
  }

  // Whether elements of a storage type can be those of a block.
  static bool serve(const void* row, int64_t size) {
    return std::is_same_v<T, C> && row && size % Base::kLanes == 0;
  }
  static C* as_block(void* row) { return static_cast<C*>(row); }

  // h of columns [start, start + size): where it is anyway, or in the block.
  template <class Input>
  FUSED_INLINE static const C* make_h(const Input& input, int64_t start, int64_t size, C* block) {
    Base::prefetch(input.ahead + start, size);
    if (const T* const row = input.plain(); serve(row, size)) return Base::array(row + start);
    Base::for_each_pack(size, [&](int64_t from, auto count, auto n) FUSED_INLINE {
      V h[decltype(count)::value];
      input.load(h, start + from, n);
      input.affine(h, start + from, n);
      Base::store_pack(block + from, h);
    });
    return block;
  }

  // What makes h of half k of the columns.
  template <class Input>
  FUSED_INLINE static decltype(auto) half_of(const Input& input, int64_t k) {
    if constexpr (kGated) {
      return k ? input.gates() : input;
    } else {
      return (input);
    }
  }

  // Columns [0, cols) of y; gates are `cols` columns behind what they multiply.
  template <class Input>
  FUSED_INLINE void output(int64_t cols, const Input& input, const OutputRow<T>& row) {
    if constexpr (kInside) {
      Base::for_each_pack(cols, [&](int64_t start, auto count, auto n) FUSED_INLINE {
        V h[decltype(count)::value];
        Base::prefetch(input.ahead + start, Base::kPack);
        input.load(h, start, n);
        input.affine(h, start, n);
        if constexpr (!kCompares) {
          each(h, start,
               [&](int k, int64_t) FUSED_INLINE { h[k] = Inside::value(h[k], Parameters{}); });
        } else if (compares) {
          each(h, start,
               [&](int k, int64_t) FUSED_INLINE { h[k] = select(h[k] < alpha, alpha, h[k]); });
        }
        finish(h, start, n, input, row);
      });
      return;
    }
    alignas(64) C blocks[kHalves][kSegment];
    const bool bare = !threshold && !input.rescales() && !row.residual && !streaming;
    for (int64_t first = 0; first < cols; first += kSegment) {
      const int64_t size = std::min(kSegment, cols - first);
      const C* h[kHalves];
      for (int64_t k = 0; k < kHalves; ++k) {
        h[k] = make_h(half_of(input, k), k * cols + first, size, blocks[k]);
      }
      const bool direct = bare && serve(row.y, size);
      C* const y_block = direct ? as_block(row.y + first) : blocks[0];
      if constexpr (kGated) {
        stages.gate(y_block, h[0], h[1], size);
      } else {
        stages.value(y_block, h[0], size, stages.alpha, stages.beta);
      }
      if (direct) continue;
      Base::for_each_pack(size, [&](int64_t from, auto count, auto n) FUSED_INLINE {
        V y[decltype(count)::value];
        Base::load_pack(y, y_block + from);
        finish(y, first + from, n, input, row);
      });
    }
  }

  // Calls done(g, x, start, n) for the packs of columns [begin, end), with g the gradient of h and
  // x what it was made of; begin is a multiple of kRandomBlock. Of a gated activation begin is 0,
  // and the gates, `end` columns behind, have their turn after each segment.
  template <class Input, class Done>
  FUSED_INLINE void gradient(int64_t begin, int64_t end, const Input& input,
                             const GradientRow<T>& row, const Done& done) {
    const auto load_gradient = [&](auto& g, int64_t start, auto n) FUSED_INLINE {
      each(g, start, [&](int k, int64_t i) FUSED_INLINE { g[k] = load(row.dy + i, n); });
      drop(g, start, row.counter);
      input.rescale(g, start, n);
    };
    if constexpr (kInside) {
      Base::for_each_pack(end - begin, [&](int64_t from, auto count, auto n) FUSED_INLINE {
        constexpr int kCount = decltype(count)::value;
        const int64_t start = begin + from;
        V x[kCount], h[kCount], g[kCount];
        Base::prefetch(input.ahead + start, Base::kPack);
        Base::prefetch(row.ahead + start, Base::kPack);
        input.load(x, start, n);
        // h first and the rest beside it, for want of registers.
        if (!kCompares || compares) {
          each(x, start, [&](int k, int64_t) FUSED_INLINE { h[k] = x[k]; });
          input.affine(h, start, n);
          load_gradient(g, start, n);
        }
        if constexpr (!kCompares) {
          each(g, start, [&](int k, int64_t) FUSED_INLINE {
            g[k] = Inside::gradient(g[k], h[k], Parameters{});
          });
        } else if (compares) {
          each(g, start,
               [&](int k, int64_t) FUSED_INLINE { g[k] = select(h[k] <= alpha, V{}, g[k]); });
        } else {
          load_gradient(g, start, n);
        }
        done(g, x, start, n);
      });
      return;
    }
    alignas(64) C blocks[kHalves][kSegment], g_block[kSegment];
    const bool bare = !threshold && !input.rescales();
    for (int64_t first = begin; first < end; first += kSegment) {
      const int64_t size = std::min(kSegment, end - first);
      const C* h[kHalves];
      for (int64_t k = 0; k < kHalves; ++k) {
        h[k] = make_h(half_of(input, k), k * end + first, size, blocks[k]);
      }
      const C* g = g_block;
      Base::prefetch(row.ahead + first, size);
      if (bare && serve(row.dy, size)) {
        g = Base::array(row.dy + first);
      } else {
        Base::for_each_pack(size, [&](int64_t from, auto count, auto n) FUSED_INLINE {
          V made[decltype(count)::value];
          load_gradient(made, first + from, n);
          Base::store_pack(g_block + from, made);
        });
      }
      const bool direct = serve(row.dz, size);
      C* made[kHalves];
      for (int64_t k = 0; k < kHalves; ++k) {
        made[k] = direct ? as_block((k ? row.dgate : row.dz) + k * end + first) : blocks[k];
      }
      if constexpr (kGated) {
        stages.gate_gradient(made[0], made[1], g, h[0], h[1], size);
      } else {
        stages.gradient(made[0], g, h[0], size, stages.alpha, stages.beta);
      }
      for (int64_t k = 0; k < kHalves && !direct; ++k) {
        const int64_t start = k * end + first;
        Base::for_each_pack(size, [&](int64_t from, auto count, auto n) FUSED_INLINE {
          V values[decltype(count)::value], x[decltype(count)::value]{};
          Base::load_pack(values, blocks[k] + from);
          if (input.gives_x()) half_of(input, k).load(x, start + from, n);
          done(values, x, start + from, n);
        });
      }
    }
  }

  const Stages& stages;
  const bool compares;  // with alpha: relu, not none
  const V alpha, scale;
  const uint32_t threshold;
  const bool streaming;
  const PhiloxKeys keys;
  KeepBlock keep;
};

}  // namespace fused::FUSED_TARGET
