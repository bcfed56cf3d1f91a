// Drawing a token: temperature, min-p, top-k, top-p, then Gumbel-max with noise from a counter-based generator.
//
// The meaning stands in kernels/reference.py (`truncate`, `gumbel_sample`). Nothing is sorted but the one bucket of a
// histogram in which a boundary falls, and noise is made only for tokens that could still win.

#include <algorithm>
#include <limits>
#include <vector>

#include "native.h"
#include "pool.h"
#include "vector.h"

namespace baton {
namespace {

constexpr float kNever = -std::numeric_limits<float>::infinity();
constexpr float kMostNoise = 23.0f;  // -log of the smallest draw, 2^-33, is 22.9
constexpr int kBuckets = 1024;
constexpr float kBucketsPerNat = 32.0f;  // the last bucket takes everything beyond 32 nats

// Natural logarithm of normal positive numbers, to about 2 units in the last place (Moshier's Cephes, logf).
inline f32x16 logarithm(f32x16 x) {
    i32x16 bits = (i32x16)x;
    i32x16 exponent = ((bits >> 23) & 0xff) - 126;
    f32x16 m = (f32x16)((bits & 0x007fffff) | 0x3f000000);  // in [0.5, 1)
    i32x16 small = (i32x16)(m < 0.707106781186547524f);
    f32x16 e = __builtin_convertvector(exponent + small, f32x16);  // a comparison that holds is -1
    m = m - 1.0f + (f32x16)((i32x16)m & small);
    f32x16 z = m * m;
    f32x16 y = splat(7.0376836292e-2f);
    y = y * m - 1.1514610310e-1f;
    y = y * m + 1.1676998740e-1f;
    y = y * m - 1.2420140846e-1f;
    y = y * m + 1.4249322787e-1f;
    y = y * m - 1.6668057665e-1f;
    y = y * m + 2.0000714765e-1f;
    y = y * m - 2.4999993993e-1f;
    y = y * m + 3.3333331174e-1f;
    y = y * m * z + e * -2.12194440e-4f - 0.5f * z;
    return m + y + e * 0.693359375f;
}

// -log of an exponential draw, from 32 random bits. log(1 - u) by way of the rounding of 1 - u (Kahan).
inline f32x16 gumbel(u32x16 words) {
    // Halves convert exactly and their sum is rounded once, to nearest, as a conversion of all 32 bits is.
    f32x16 wide = __builtin_convertvector((i32x16)(words >> 16), f32x16) * 65536.0f + __builtin_convertvector((i32x16)(words & 0xffffu), f32x16);
    f32x16 u = (wide + 0.5f) * 0x1p-32f;
    u = u > 1.0f - 0x1p-24f ? splat(1.0f - 0x1p-24f) : u;
    f32x16 rest = 1.0f - u;
    f32x16 log1p = rest == 1.0f ? -u : logarithm(rest) * u / (1.0f - rest);
    return -logarithm(-log1p);
}

// Philox4x32-10 (Salmon et al. 2011) for sixteen counters (first + i, output_index, sequence_index, 0): 64 words, those
// of token 4 * (first + i) + j at 4 * i + j.
void philox(uint32_t first, uint32_t output_index, uint32_t sequence_index, uint64_t seed, uint32_t* words) {
    uint32_t x0[16], x1[16], x2[16], x3[16];
    for (uint32_t i = 0; i < 16; ++i) x0[i] = first + i, x1[i] = output_index, x2[i] = sequence_index, x3[i] = 0;
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u)
        for (int i = 0; i < 16; ++i) {
            const uint64_t p0 = uint64_t{0xD2511F53u} * x0[i], p1 = uint64_t{0xCD9E8D57u} * x2[i];
            x0[i] = static_cast<uint32_t>(p1 >> 32) ^ x1[i] ^ k0;
            x2[i] = static_cast<uint32_t>(p0 >> 32) ^ x3[i] ^ k1;
            x1[i] = static_cast<uint32_t>(p1);
            x3[i] = static_cast<uint32_t>(p0);
        }
    for (int i = 0; i < 16; ++i) words[4 * i] = x0[i], words[4 * i + 1] = x1[i], words[4 * i + 2] = x2[i], words[4 * i + 3] = x3[i];
}

int bucket_of(float scaled) {
    return scaled > -(kBuckets - 1) / kBucketsPerNat ? static_cast<int>(-scaled * kBucketsPerNat) : kBuckets - 1;
}

// Counts and masses of tokens by how far they lie below the likeliest, and the members of one bucket in order.
class Histogram {
  public:
    Histogram(const std::vector<float>& scaled, long size, float least) : scaled_(scaled), size_(size), least_(least), count_(kBuckets), mass_(kBuckets) {
        for (long i = 0; i < size; i += 16) {
            f32x16 x = load<f32x16>(scaled.data() + i);
            f32x16 weights = exponential(x);
            for (int j = 0; j < 16; ++j) {
                if (!(x[j] >= least) || x[j] == kNever) continue;
                const int bucket = bucket_of(x[j]);
                ++count_[bucket];
                mass_[bucket] += weights[j];
            }
        }
    }

    // The k-th largest value, or `least` where there are fewer.
    float kth(long k) const {
        for (int bucket = 0; bucket < kBuckets; ++bucket) {
            if (k <= count_[bucket]) return members(bucket, least_)[k - 1];
            k -= count_[bucket];
        }
        return least_;
    }

    // The smallest value such that the mass of larger ones is below the share `p` of all that is at least `least`.
    float nucleus(float p, float least) const {
        const int last = least == kNever ? kBuckets - 1 : bucket_of(least);
        double tail = 0.0;  // of the last bucket, only what is at least `least`
        for (float x : members(last, least)) tail += std::exp(x);
        double total = tail, before = 0.0;
        for (int bucket = 0; bucket < last; ++bucket) total += mass_[bucket];
        for (int bucket = 0; bucket <= last; ++bucket) {
            const double mass = bucket < last ? mass_[bucket] : tail;
            if (before + mass < p * total) {
                before += mass;
                continue;
            }
            const std::vector<float> falling = members(bucket, least);
            float kept = falling.empty() ? least : falling.front();
            for (float x : falling) {
                if (before >= p * total) break;
                kept = x;
                before += std::exp(x);
            }
            return kept;
        }
        return least;
    }

  private:
    std::vector<float> members(int bucket, float least) const {
        std::vector<float> found;
        for (long i = 0; i < size_; ++i)
            if (scaled_[i] >= least && scaled_[i] != kNever && bucket_of(scaled_[i]) == bucket) found.push_back(scaled_[i]);
        std::sort(found.begin(), found.end(), std::greater<float>());
        return found;
    }

    const std::vector<float>& scaled_;
    long size_;
    float least_;
    std::vector<long> count_;
    std::vector<double> mass_;
};

template <class T>
int64_t argmax(const T* logits, long vocabulary) {
    f32x16 most = splat(kNever);
    for (long i = 0; i + 16 <= vocabulary; i += 16) most = maximum(most, widen16(logits + i));
    float highest = maximum(most);
    for (long i = vocabulary / 16 * 16; i < vocabulary; ++i) highest = std::max(highest, widen(logits[i]));
    for (long i = 0; i < vocabulary; ++i)
        if (widen(logits[i]) == highest) return i;
    return 0;
}

int64_t draw(const float* logits, long vocabulary, const BatonDraw& how) {
    const long size = (vocabulary + 63) / 64 * 64;
    static thread_local std::vector<float> scaled;
    scaled.assign(size, kNever);
    f32x16 most = splat(kNever);
    for (long i = 0; i + 16 <= vocabulary; i += 16) most = maximum(most, load<f32x16>(logits + i));
    float highest = maximum(most);
    for (long i = vocabulary / 16 * 16; i < vocabulary; ++i) highest = std::max(highest, logits[i]);
    for (long i = 0; i < vocabulary; ++i) scaled[i] = (logits[i] - highest) / how.temperature;
    float least = how.min_p > 0.0f ? std::log(how.min_p) : kNever;
    const bool top_k = how.top_k > 0 && how.top_k < vocabulary;
    if (top_k || how.top_p < 1.0f) {
        const Histogram histogram(scaled, size, least);
        if (top_k) least = std::max(least, histogram.kth(how.top_k));
        if (how.top_p < 1.0f) least = std::max(least, histogram.nucleus(how.top_p, least));
    }
    float best = kNever;
    int64_t token = 0;
    for (long at = 0; at < size; at += 64) {
        most = splat(kNever);
        for (int v = 0; v < 64; v += 16) most = maximum(most, load<f32x16>(scaled.data() + at + v));
        const float possible = maximum(most);
        if (possible < least || possible == kNever || possible + kMostNoise < best) continue;
        uint32_t words[64];
        philox(static_cast<uint32_t>(at / 4), static_cast<uint32_t>(how.output_index), static_cast<uint32_t>(how.sequence_index), static_cast<uint64_t>(how.seed), words);
        for (int v = 0; v < 64; v += 16) {
            f32x16 x = load<f32x16>(scaled.data() + at + v);
            float scores[16];
            store(scores, x < least ? splat(kNever) : x + gumbel(load<u32x16>(words + v)));
            for (int j = 0; j < 16; ++j)
                if (scores[j] > best) best = scores[j], token = at + v + j;
        }
    }
    return token;
}

}  // namespace
}  // namespace baton

using namespace baton;

void baton_argmax(BatonPool* pool, int32_t type, const void* logits, int64_t count, int64_t vocabulary, int64_t* tokens) {
    pool->run(count, [&](long i) {
        if (type)
            tokens[i] = argmax(static_cast<const BFloat16*>(logits) + i * vocabulary, vocabulary);
        else
            tokens[i] = argmax(static_cast<const float*>(logits) + i * vocabulary, vocabulary);
    });
}

void baton_draw(BatonPool* pool, const float* logits, int64_t count, int64_t vocabulary, const BatonDraw* how, int64_t* tokens) {
    pool->run(count, [&](long i) { tokens[i] = draw(logits + i * vocabulary, vocabulary, how[i]); });
}
