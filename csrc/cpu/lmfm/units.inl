// Brings channels of a map into the layout (pixels, lanes), and back, so that everything else is loops over vectors,
// whatever the strides and the dtype of the map are. lmfm_kernel.inl includes this file.

template <typename Acc>
constexpr int64_t kLanes = kWidth<Acc>;

#if !defined(__clang__)
// The lanes of two vectors that a step of a transposition takes.
template <typename Acc, int step, bool high>
struct Lanes {
  decltype(Mask<Acc>{}[0] + 0) from[kLanes<Acc>] = {};
  constexpr Lanes() {
    for (int64_t k = 0; k < kLanes<Acc>; ++k) {
      const bool second = (k & step) != 0;
      from[k] = second ? kLanes<Acc> + k - (high ? 0 : step) : k + (high ? step : 0);
    }
  }
};

template <typename Acc, int step = 1>
BCMF_INLINE void transpose(Vector<Acc> (&rows)[kLanes<Acc>]) {
  static constexpr Lanes<Acc, step, false> low;
  static constexpr Lanes<Acc, step, true> high;
  Mask<Acc> low_lanes, high_lanes;
  std::memcpy(&low_lanes, low.from, sizeof(low_lanes));
  std::memcpy(&high_lanes, high.from, sizeof(high_lanes));
  for (int64_t i = 0; i < kLanes<Acc>; ++i) {
    if (i & step) continue;
    const Vector<Acc> a = rows[i], b = rows[i + step];
    rows[i] = __builtin_shuffle(a, b, low_lanes);
    rows[i + step] = __builtin_shuffle(a, b, high_lanes);
  }
  if constexpr (2 * step < kLanes<Acc>) transpose<Acc, 2 * step>(rows);
}
#else
template <typename Acc>
BCMF_INLINE void transpose(Vector<Acc> (&rows)[kLanes<Acc>]) {
  for (int64_t i = 0; i < kLanes<Acc>; ++i)
    for (int64_t k = 0; k < i; ++k) {
      const Acc a = rows[i][k];
      rows[i][k] = rows[k][i];
      rows[k][i] = a;
    }
}
#endif

// The channels of a unit, or of several units that are worked on together.
struct Channels {
  int64_t first, count;
};
BCMF_INLINE Channels part_of(Channels channels, int64_t from, int64_t lanes) {
  return {channels.first + from, channels.count - from < lanes ? channels.count - from : lanes};
}

// Calls f(pixel, offset, length) for segments of pixels that are one stride apart: the whole map, or each row.
template <typename F>
BCMF_INLINE void for_segments(const MapView& v, int64_t n, int64_t H, int64_t W, F f) {
  if (v.stride_h == W * v.stride_w) return f(int64_t{0}, n * v.stride_n, H * W);
  for (int64_t y = 0; y < H; ++y) f(y * W, n * v.stride_n + y * v.stride_h, W);
}

// Reads `length` pixels of some channels in channels_last to units that lie `pitch` apart, all units of a pixel at
// once.
template <typename Acc, typename Scalar>
BCMF_INLINE void load_pixels(const Scalar* map, int64_t stride, int64_t channels, int64_t length, Acc* to,
                             int64_t pitch) {
  for (int64_t i = 0; i < length; ++i, map += stride, to += kLanes<Acc>) {
    Acc* unit = to;
    int64_t c = 0;
    for (; c + kLanes<Acc> <= channels; c += kLanes<Acc>, unit += pitch) store_vector(load_full(map + c), unit);
    if (c < channels) store_vector(load_widened<Acc>(map + c, channels - c), unit);
  }
}
template <typename Acc, typename Scalar>
BCMF_INLINE void store_pixels(const Acc* from, int64_t pitch, int64_t channels, int64_t length, Scalar* map,
                              int64_t stride) {
  for (int64_t i = 0; i < length; ++i, map += stride, from += kLanes<Acc>) {
    const Acc* unit = from;
    int64_t c = 0;
    for (; c + kLanes<Acc> <= channels; c += kLanes<Acc>, unit += pitch) store_full(load_vector(unit), map + c);
    if (c < channels) store_narrowed<Acc>(load_vector(unit), map + c, channels - c);
  }
}

// Reads `length` pixels of one unit in any other layout. Rows of a channel are transposed if they are contiguous.
template <typename Acc, typename Scalar>
BCMF_INLINE void load_rows(const Scalar* from, int64_t stride_c, int64_t stride_w, int64_t channels, int64_t length,
                           Acc* unit) {
  int64_t i = 0;
  for (; stride_w == 1 && i + kLanes<Acc> <= length; i += kLanes<Acc>) {
    Vector<Acc> rows[kLanes<Acc>];
    for (int64_t c = 0; c < kLanes<Acc>; ++c)
      rows[c] = c < channels ? load_full(from + c * stride_c + i) : Vector<Acc>{};
    transpose<Acc>(rows);
    for (int64_t k = 0; k < kLanes<Acc>; ++k) store_vector(rows[k], unit + (i + k) * kLanes<Acc>);
  }
  for (; i < length; ++i)
    for (int64_t c = 0; c < kLanes<Acc>; ++c)
      unit[i * kLanes<Acc> + c] = c < channels ? widen(from[c * stride_c + i * stride_w]) : Acc(0);
}
template <typename Acc, typename Scalar>
BCMF_INLINE void store_rows(const Acc* unit, int64_t channels, int64_t length, Scalar* to, int64_t stride_c,
                            int64_t stride_w) {
  int64_t i = 0;
  for (; stride_w == 1 && i + kLanes<Acc> <= length; i += kLanes<Acc>) {
    Vector<Acc> rows[kLanes<Acc>];
    for (int64_t k = 0; k < kLanes<Acc>; ++k) rows[k] = load_vector(unit + (i + k) * kLanes<Acc>);
    transpose<Acc>(rows);
    for (int64_t c = 0; c < channels; ++c) store_full(rows[c], to + c * stride_c + i);
  }
  for (; i < length; ++i)
    for (int64_t c = 0; c < channels; ++c) narrow(unit[i * kLanes<Acc> + c], to + c * stride_c + i * stride_w);
}

// Reads some channels of image n, (H, W), to units of (H * W, lanes) that lie `pitch` apart.
template <typename Acc>
static void load_units(const MapView& v, int64_t n, Channels channels, int64_t H, int64_t W, Acc* to, int64_t pitch) {
  for_segments(v, n, H, W, [&](int64_t pixel, int64_t offset, int64_t length) {
    with_entries<Acc>(v, offset + channels.first * v.stride_c, [&](const auto* map) {
      Acc* unit = to + pixel * kLanes<Acc>;
      if (v.stride_c == 1) return load_pixels(map, v.stride_w, channels.count, length, unit, pitch);
      for (int64_t c = 0; c < channels.count; c += kLanes<Acc>, unit += pitch)
        load_rows(map + c * v.stride_c, v.stride_c, v.stride_w, part_of(channels, c, kLanes<Acc>).count, length, unit);
    });
  });
}

// Writes units back to some channels of image n.
template <typename Acc>
static void store_units(const MapView& v, int64_t n, Channels channels, int64_t H, int64_t W, const Acc* from,
                        int64_t pitch) {
  for_segments(v, n, H, W, [&](int64_t pixel, int64_t offset, int64_t length) {
    with_entries<Acc>(v, offset + channels.first * v.stride_c, [&](auto* map) {
      const Acc* unit = from + pixel * kLanes<Acc>;
      if (v.stride_c == 1) return store_pixels(unit, pitch, channels.count, length, map, v.stride_w);
      for (int64_t c = 0; c < channels.count; c += kLanes<Acc>, unit += pitch)
        store_rows(unit, part_of(channels, c, kLanes<Acc>).count, length, map + c * v.stride_c, v.stride_c, v.stride_w);
    });
  });
}
