// The device's number formats on the host: round to nearest even, TF32 by rounding away from zero.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "params.h"

namespace pointfuse {

inline float float_of_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline uint32_t bits_of_float(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

inline float to_float(float value) { return value; }
inline float to_float(bfloat16_t value) { return float_of_bits(uint32_t(value.bits) << 16); }

inline float to_float(half_t value) {
  const uint32_t sign = uint32_t(value.bits & 0x8000) << 16, magnitude = value.bits & 0x7fff;
  if (magnitude >= 0x7c00) return float_of_bits(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
  // 2^112 moves the exponent from half's bias to float's, and makes subnormal halves normal.
  return float_of_bits(sign | bits_of_float(float_of_bits(magnitude << 13) * 0x1p112f));
}

template <class T>
T from_float(float value);

template <>
inline float from_float<float>(float value) {
  return value;
}

template <>
inline bfloat16_t from_float<bfloat16_t>(float value) {
  if (std::isnan(value)) return {0x7fff};
  const uint32_t bits = bits_of_float(value);
  return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

template <>
inline half_t from_float<half_t>(float value) {
  if (std::isnan(value)) return {0x7fff};
  const uint32_t bits = bits_of_float(value);
  const uint16_t sign = uint16_t(bits >> 16 & 0x8000);
  const float magnitude = std::fabs(value);
  if (magnitude >= 65520.0f) return {uint16_t(sign | 0x7c00)};
  if (magnitude < 0x1p-14f) {
    // The unit of this sum's last place is that of a subnormal half, so that the addition rounds.
    return {uint16_t(sign | (bits_of_float(magnitude + 0.5f) - bits_of_float(0.5f)))};
  }
  const uint32_t rebiased = bits_of_float(magnitude) - (112u << 23);
  return {uint16_t(sign | (rebiased + 0xfff + (rebiased >> 13 & 1)) >> 13)};
}

inline uint32_t to_tf32(float value) {
  if (std::isnan(value)) return 0x7fffffff;
  return (bits_of_float(value) + 0x1000) & ~0x1fffu;
}

// As TMA rounds to TF32: to nearest even; infinities and NaN stay.
inline float tf32_by_tma(float value) {
  const uint32_t bits = bits_of_float(value);
  return std::isfinite(value) ? float_of_bits((bits + 0xfff + (bits >> 13 & 1)) & ~0x1fffu) : value;
}

// What the tensor cores make of a 32-bit operand.
inline float tf32_operand(uint32_t bits) { return float_of_bits(bits & ~0x1fffu); }

template <class T>
uint32_t pack2(float low, float high) {
  return from_float<T>(low).bits | uint32_t(from_float<T>(high).bits) << 16;
}

inline float exp_fast(float value) { return std::exp(value); }
inline float divide_fast(float a, float b) { return std::fabs(b) > 0x1p126f ? a * 0.0f : a / b; }
inline float sqrt_rn(float value) { return std::sqrt(value); }
inline float fma(float a, float b, float c) { return std::fma(a, b, c); }

}  // namespace pointfuse
