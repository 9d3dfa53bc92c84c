/* Latencies with 64 buckets to each power of two, so that every answer is within 2 %. */
#ifndef HISTOGRAM_H
#define HISTOGRAM_H

#include <stdint.h>

enum { BUCKET_BITS = 6, BUCKETS = 64 << BUCKET_BITS };

struct histogram {
    uint64_t count;
    uint64_t buckets[BUCKETS];
};

static inline void histogram_add(struct histogram *histogram, uint64_t ns)
{
    int power = 63 - __builtin_clzll(ns | 1);
    uint64_t within = power > BUCKET_BITS ? ns >> (power - BUCKET_BITS)
                                          : ns << (BUCKET_BITS - power);

    within &= (1 << BUCKET_BITS) - 1;
    histogram->buckets[((uint64_t)power << BUCKET_BITS) + within]++;
    histogram->count++;
}

/* The latency in us that `part` (0 to 1) of all did not exceed. */
static inline double percentile_us(const struct histogram *histogram, double part)
{
    uint64_t below = 0;

    for (unsigned i = 0; i < BUCKETS; i++) {
        below += histogram->buckets[i];
        if (histogram->buckets[i] && (double)below >= part * (double)histogram->count) {
            double power = (double)(UINT64_C(1) << (i >> BUCKET_BITS));
            double within = (i & ((1 << BUCKET_BITS) - 1)) + 0.5;

            return power * (1 + within / (1 << BUCKET_BITS)) / 1000;
        }
    }
    return 0;
}

#endif
