/* rANS with a 64-bit state, 32-bit words and 16-bit frequencies, as FORMAT.md specifies (rans64.h of ryg_rans).

   Uses no C library, so that one shared library serves every libc of a platform. tools/build_rans.py compiles it.
   Nothing is read or written outside the buffers whose sizes are passed; what does not fit is an error (-1). */

#include <stdint.h>

#define LOWEST (1ull << 31) /* of a state between two symbols */

#if defined(_WIN32)
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

#if defined(_WIN32)
int __stdcall DllMainCRTStartup(void *module, unsigned reason, void *reserved) {
    (void)module, (void)reason, (void)reserved;
    return 1;
}
#endif

/* Cumulative frequencies: `count` tables of `stride` entries each, of which lengths[i] are valid; offsets[i] is the
   symbol of entry 0. */
typedef struct {
    const uint32_t *cdfs;
    const int32_t *lengths;
    const int32_t *offsets;
    int64_t count;
    int64_t stride;
} Tables;

static uint32_t load_word(const uint8_t *bytes) {
    return (uint32_t)bytes[0] | (uint32_t)bytes[1] << 8 | (uint32_t)bytes[2] << 16 | (uint32_t)bytes[3] << 24;
}

static void store_word(uint8_t *bytes, uint32_t word) {
    for (int i = 0; i < 4; i++) bytes[i] = (uint8_t)(word >> 8 * i);
}

/* Codes `n` symbols from the last to the first into the end of `out`. Returns the number of bytes, or -1 for an index
   or a symbol without a frequency, or if `out` is too small. */
EXPORT int64_t rans_encode(const int16_t *symbols, const uint8_t *indexes, int64_t n, const Tables *tables, uint8_t *out,
                           int64_t size) {
    uint64_t x = LOWEST;
    int64_t place = size;
    for (int64_t i = n - 1; i >= 0; i--) {
        int64_t table = indexes[i];
        if (table >= tables->count) return -1;
        int64_t entry = (int64_t)symbols[i] - tables->offsets[table];
        if (entry < 0 || entry + 1 >= tables->lengths[table]) return -1;
        const uint32_t *cdf = tables->cdfs + table * tables->stride + entry;
        uint64_t frequency = cdf[1] - cdf[0];
        if (frequency == 0 || frequency > 1u << 16) return -1;
        if (x >= frequency << 47) {
            if (place < 4) return -1;
            store_word(out + (place -= 4), (uint32_t)x);
            x >>= 32;
        }
        x = ((x / frequency) << 16) + x % frequency + cdf[0];
    }
    if (place < 8) return -1;
    store_word(out + (place -= 4), (uint32_t)(x >> 32));
    store_word(out + (place -= 4), (uint32_t)x);
    return size - place;
}

/* Decodes `n` symbols. `state` and `place` (bytes of `data` read so far) are updated. Words behind the end of `data`
   are 0. Returns 0, or -1 for an index without a table. */
EXPORT int64_t rans_decode(const uint8_t *data, int64_t size, uint64_t *state, int64_t *place, const uint8_t *indexes,
                           int64_t n, const Tables *tables, int32_t *symbols) {
    uint64_t x = *state;
    int64_t at = *place;
    for (int64_t i = 0; i < n; i++) {
        int64_t table = indexes[i];
        if (table >= tables->count) return -1;
        const uint32_t *cdf = tables->cdfs + table * tables->stride;
        uint32_t m = (uint32_t)(x & 0xffff);
        int64_t low = 0, high = tables->lengths[table] - 1; /* cdf[low] <= m < cdf[high] */
        while (high - low > 1) {
            int64_t middle = (low + high) / 2;
            if (cdf[middle] <= m) low = middle;
            else high = middle;
        }
        x = (uint64_t)(cdf[low + 1] - cdf[low]) * (x >> 16) + m - cdf[low];
        if (x < LOWEST) {
            uint32_t word = 0;
            if (at >= 0 && size - at >= 4) word = load_word(data + at);
            at += 4;
            x = x << 32 | word;
        }
        symbols[i] = (int32_t)low + tables->offsets[table];
    }
    *state = x;
    *place = at;
    return 0;
}
