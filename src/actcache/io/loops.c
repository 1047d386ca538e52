/* The loops between the disk and the caller's buffer: look-up, copy, read, digest, comparison.
 *
 * Plain functions over plain arrays, without Python's API: one library for every Python, called by ctypes, which frees
 * the GIL. actcache/io/loops.py describes each function where its caller looks; the structures here and there are one.
 * Arrays are C-contiguous, in the machine's byte order, which is little-endian wherever a store is read.
 *
 * What a stranger's store says arrives here as offsets and lengths. Each is compared with the size of the memory or of
 * the table that it points into before it is used; what does not fit is reported, never followed.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>

/* What a processor may have beyond the least of x86-64. It is asked itself: __builtin_cpu_supports answers "no" to
 * everything in a shared library of some compilers (zig 0.17). */
enum { F16C = 1, AVX2 = 2, FMA = 4, ASKED = 8 };

static int processor_has(int wanted) { /* all of these, with an operating system that saves the registers */
    static _Atomic int known;
    int found = atomic_load_explicit(&known, memory_order_relaxed);
    if (!found) {
        unsigned a, b, c, d, low, high;
        const unsigned saved = 1u << 28 | 1u << 27; /* AVX, OSXSAVE */
        found = ASKED;
        if (__get_cpuid(1, &a, &b, &c, &d) && (c & saved) == saved) {
            __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
            if ((low & 6) == 6) {
                if (c & 1u << 29) found |= F16C;
                if (c & 1u << 12) found |= FMA;
                if (__get_cpuid_count(7, 0, &a, &b, &c, &d) && b & 1u << 5) found |= AVX2;
            }
        }
        atomic_store_explicit(&known, found, memory_order_relaxed);
    }
    return (found & wanted) == wanted;
}
#endif

#define PUBLIC __attribute__((visibility("default")))
#define KEY_BYTES 32
#define PAGE 4096         /* what direct reads are aligned to: a multiple of every disk's block */
#define HUGE (2 << 20)    /* bytes of a huge page */
#define PIECE (HUGE - 2 * PAGE) /* bytes of one read: a direct one brings up to two pages more */
#define PART (64 << 10)   /* bytes of rows that a thread takes at a time */
#define SHARE (1 << 20)   /* bytes in memory for which one more thread is worth waking: a sleeping core takes its time */
#define SMALL 64          /* bytes of a row below which it is not copied past the caches */
#define LONG (48 << 10)    /* bytes of an entry from which on it is digested before it is copied past the caches: a loop
                              that only reads is faster than one that does both, and the copy then finds them there */
#define STREAM (8 << 20)  /* bytes of a batch that is copied past the caches: more than a core's share of them */
#define MOST_HELPERS 63

typedef uint64_t (*digest_function)(const void *data, size_t length, uint64_t seed);
static digest_function digest_of; /* XXH3_64bits_withSeed */

PUBLIC void act_set_digest(digest_function function) { digest_of = function; }

/* What of libzstd is used, as the zstandard package exports it; NULL where there is none. */
typedef struct {
    void *(*new_decoder)(void);
    size_t (*free_decoder)(void *decoder);
    size_t (*decode)(void *decoder, void *out, size_t room, const void *frame, size_t size);
    unsigned long long (*content_size)(const void *frame, size_t size);
    size_t (*frame_size)(const void *frame, size_t size);
    unsigned (*is_error)(size_t code);
    void *(*new_encoder)(void);
    size_t (*free_encoder)(void *encoder);
    size_t (*encode)(void *encoder, void *out, size_t room, const void *data, size_t size);
    size_t (*set)(void *encoder, int parameter, int value);
    size_t (*bound)(size_t size);
} zstd_functions;

static zstd_functions zstd;

PUBLIC void act_set_zstd(const zstd_functions *functions) { zstd = *functions; }

PUBLIC int32_t act_version(void) { return 10; }

/* --- threads: they know nothing of Python, so none of them ever waits for the GIL ---------------------------------- */

typedef struct job {
    void (*run)(void *context, int64_t part);
    void *context;
    int64_t parts;
    _Atomic int64_t next;
    int wanted, active; /* helpers that may still join, and that have; under the lock */
    struct job *following;
} job;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t arrived = PTHREAD_COND_INITIALIZER, ended = PTHREAD_COND_INITIALIZER;
static pthread_once_t once = PTHREAD_ONCE_INIT;
static pthread_key_t scratch_key; /* has what belongs to a thread freed when the thread ends */
static job *jobs;
static int helpers;

static void after_fork(void) { /* the child has one thread, whoever held the lock */
    pthread_mutex_init(&lock, NULL);
    pthread_cond_init(&arrived, NULL);
    pthread_cond_init(&ended, NULL);
    jobs = NULL;
    helpers = 0;
}

static void free_own(void *own);

static void prepare(void) {
    pthread_key_create(&scratch_key, free_own);
    pthread_atfork(NULL, NULL, after_fork);
}

static void work_on(job *one) {
    int64_t part;
    while ((part = atomic_fetch_add(&one->next, 1)) < one->parts) one->run(one->context, part);
}

static void *help(void *unused) {
    (void)unused;
    pthread_mutex_lock(&lock);
    for (;;) {
        job *one = jobs;
        while (one != NULL && one->wanted == 0) one = one->following;
        if (one == NULL) {
            pthread_cond_wait(&arrived, &lock);
            continue;
        }
        one->wanted--;
        one->active++;
        pthread_mutex_unlock(&lock);
        work_on(one);
        pthread_mutex_lock(&lock);
        if (--one->active == 0) pthread_cond_broadcast(&ended);
    }
    return NULL;
}

static void start_helpers(int count) { /* under the lock */
    sigset_t all, before;
    pthread_attr_t attributes;
    if (helpers >= count) return;
    sigfillset(&all); /* signals are for the threads of Python, which can act on them */
    pthread_sigmask(SIG_SETMASK, &all, &before);
    pthread_attr_init(&attributes);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    while (helpers < count) {
        pthread_t thread;
        if (pthread_create(&thread, &attributes, help, NULL) != 0) break; /* fewer do as well */
        helpers++;
    }
    pthread_attr_destroy(&attributes);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

/* Call run(context, 0) ... run(context, parts - 1) on this thread and some others; return when all have ended. */
static void share(void (*run)(void *, int64_t), void *context, int64_t parts, int threads) {
    job mine = {.run = run, .context = context, .parts = parts};
    if (threads > parts) threads = (int)parts;
    if (threads > MOST_HELPERS + 1) threads = MOST_HELPERS + 1;
    if (threads <= 1) {
        work_on(&mine);
        return;
    }
    mine.wanted = threads - 1;
    pthread_mutex_lock(&lock);
    start_helpers(threads - 1);
    job **place = &jobs; /* behind those that came before: whoever waits for one of them is to have it first */
    while (*place != NULL) place = &(*place)->following;
    *place = &mine;
    pthread_cond_broadcast(&arrived);
    pthread_mutex_unlock(&lock);
    work_on(&mine);
    pthread_mutex_lock(&lock);
    place = &jobs;
    while (*place != &mine) place = &(*place)->following;
    *place = mine.following; /* nobody joins any more */
    while (mine.active > 0) pthread_cond_wait(&ended, &lock);
    pthread_mutex_unlock(&lock);
}

/* --- looking up ------------------------------------------------------------------------------------------------------ */

typedef struct {
    int64_t size;
    const uint64_t *prefix; /* [size] ascending: the first 8 bytes of the keys, as numbers */
    const uint8_t *rest;    /* [size, 24] the others */
    const uint32_t *segment, *origin; /* or NULL: all are the first one's */
    const uint32_t *tokens;
    const int64_t *row;
    const uint64_t *checksum;
    const uint8_t *alive; /* [size], or NULL: all are */
    int64_t segments, origins;
    const int64_t *numbers; /* [segments] the space's number of each, negative where it is gone */
    const int64_t *ranks;   /* [origins] of their names among all origins */
} table;

static uint64_t big_endian(const uint8_t *bytes) {
    uint64_t word;
    memcpy(&word, bytes, 8);
    return __builtin_bswap64(word);
}

#define PER_PREFIX (1.0 / 18446744073709551616.0) /* 2 to the power of -64 */

static int64_t within(double position, int64_t size) {
    return position <= 0 ? 0 : position >= (double)(size - 1) ? size - 1 : (int64_t)position;
}

/* Return where a prefix would lie in a table if all lay evenly, as those of digests do, nearly. */
static int64_t guess(int64_t size, uint64_t wanted) { return within((double)wanted * PER_PREFIX * (double)size, size); }

/* Return the first position whose prefix is not less. Two guesses land near where prefixes lie evenly; from there, steps
 * that double find both sides of it, in a stranger's table of any prefixes, too, and halves the rest. */
static int64_t lower_bound(const uint64_t *prefix, int64_t size, uint64_t wanted) {
    if (size == 0) return 0;
    int64_t at = guess(size, wanted), low = 0, high = size, step = 4;
    at = within((double)at + ((double)wanted - (double)prefix[at]) * PER_PREFIX * (double)size, size);
    if (prefix[at] < wanted) {
        for (low = at + 1; low + step < size; step *= 2) {
            if (prefix[low + step] >= wanted) {
                high = low + step;
                break;
            }
            low += step + 1;
        }
    } else {
        for (high = at; high - step >= 0; step *= 2) {
            if (prefix[high - step] < wanted) {
                low = high - step + 1;
                break;
            }
            high -= step;
        }
    }
    while (low < high) {
        int64_t middle = low + (high - low) / 2;
        if (prefix[middle] < wanted)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

typedef struct {
    int64_t count;
    const uint8_t *keys; /* [count, 32] */
    int64_t tables;
    const table *table;
    int64_t segments;
    const int64_t *limits; /* [segments] rows that each has */
    const int64_t *names;  /* [segments] ranks of their names */
    int64_t *tokens;       /* [count], 0: absent */
    uint64_t *checksums;   /* [count] */
    int64_t *segment, *row; /* [count] */
    _Atomic int64_t outside; /* entries that the tables place outside of their segments */
} lookup;

#define LOOKUP_PART 512 /* keys that a thread takes at a time */
#define GROUP 16        /* keys whose cache misses overlap: one after another, they are what a look-up costs */

static void prefetch_entry(const table *of, int64_t position) {
    if (position >= of->size) return;
    __builtin_prefetch(of->rest + position * (KEY_BYTES - 8));
    if (of->segment != NULL) __builtin_prefetch(of->segment + position);
    if (of->origin != NULL) __builtin_prefetch(of->origin + position);
    __builtin_prefetch(of->tokens + position);
    __builtin_prefetch(of->row + position);
    __builtin_prefetch(of->checksum + position);
}

/* Look at the entries of a table from a position on, which is the first of the key's prefix; better ones than the best
 * so far take its place. */
static void look_at(lookup *this, int64_t i, const table *of, int64_t position, uint64_t prefix, int64_t *best) {
    const uint8_t *key = this->keys + i * KEY_BYTES;
    /* Some share their prefix with another key; the latest copy comes first, and may be deleted. */
    for (; position < of->size && of->prefix[position] == prefix; position++) {
        if (memcmp(of->rest + position * (KEY_BYTES - 8), key + 8, KEY_BYTES - 8) == 0 &&
            (of->alive == NULL || of->alive[position]))
            break;
    }
    if (position >= of->size || of->prefix[position] != prefix) return;
    int64_t segment = of->segment == NULL ? 0 : of->segment[position], row = of->row[position];
    int64_t origin = of->origin == NULL ? 0 : of->origin[position], tokens = of->tokens[position];
    int64_t number = segment < of->segments ? of->numbers[segment] : -1;
    if (number < 0 || number >= this->segments || origin >= of->origins || row < 0 || tokens <= 0 ||
        row > this->limits[number] - tokens) {
        atomic_fetch_add(&this->outside, 1);
        return;
    }
    int64_t place = of->ranks[origin] * this->segments + this->names[number];
    if (place <= *best) return;
    *best = place;
    this->tokens[i] = tokens;
    this->checksums[i] = of->checksum[position];
    this->segment[i] = number;
    this->row[i] = row;
}

static void look_up_group(lookup *this, int64_t first, int64_t count) {
    uint64_t prefixes[GROUP];
    int64_t best[GROUP], positions[GROUP];
    for (int64_t n = 0; n < count; n++) {
        int64_t i = first + n;
        prefixes[n] = big_endian(this->keys + i * KEY_BYTES);
        best[n] = this->segment[i] = this->row[i] = -1;
        this->tokens[i] = 0;
        this->checksums[i] = 0;
    }
    for (int64_t t = 0; t < this->tables; t++) {
        const table *of = this->table + t;
        for (int64_t n = 0; n < count; n++) {
            if (of->size > 0) __builtin_prefetch(of->prefix + guess(of->size, prefixes[n]));
        }
        for (int64_t n = 0; n < count; n++) {
            positions[n] = lower_bound(of->prefix, of->size, prefixes[n]);
            prefetch_entry(of, positions[n]);
        }
        for (int64_t n = 0; n < count; n++) look_at(this, first + n, of, positions[n], prefixes[n], best + n);
    }
}

static void look_up_part(void *context, int64_t part) {
    lookup *this = context;
    int64_t last = (part + 1) * LOOKUP_PART;
    if (last > this->count) last = this->count;
    for (int64_t i = part * LOOKUP_PART; i < last; i += GROUP) {
        look_up_group(this, i, last - i < GROUP ? last - i : GROUP);
    }
}

PUBLIC void act_locate(lookup *this, int32_t threads) {
    pthread_once(&once, prepare);
    share(look_up_part, this, (this->count + LOOKUP_PART - 1) / LOOKUP_PART, threads);
}

/* --- rows: from memory or files into the caller's buffers, and their digests ----------------------------------------- */

typedef struct {
    int64_t row_bytes;
    const uint8_t *base;   /* mapped memory; NULL: all is read from files */
    int64_t size;          /* bytes of it */
    const int64_t *begins; /* [count] where each entry's rows begin in it */
    const int32_t *files;  /* [count] descriptors, for what is not in memory; NULL: none */
    const int64_t *places; /* [count] where its rows begin in its file */
    uint8_t *out;          /* of the whole batch; NULL: rows in memory are digested where they are */
    const int64_t *sizes;  /* [count] bytes of each entry's frames of zstd, of which its rows are made; NULL: plain rows */
    int64_t item;          /* bytes of a number: a frame has all first ones of an entry, the next all second ones, ... */
    int32_t way;            /* how the rows get into the buffer, one of the ways below */
    int32_t form;           /* of the numbers, where they are pooled */
    const int64_t *targets; /* SCATTERED: row of the buffer that each row of the batch goes to; ONE: which row of each entry */
    int64_t apart, room;    /* but for PACKED: bytes from one row of the buffer to the next, and how many rows it has */
} column;

/* PACKED: each entry's rows to its place. SCATTERED: each row to its target. ONE row an entry to the entry's row of the
 * buffer, or the MEAN or LARGEST of its numbers, as floats. */
enum { PACKED, SCATTERED, ONE, MEAN, LARGEST };
enum { FLOAT32, FLOAT16, BFLOAT16 };

typedef struct {
    int64_t count;
    const int64_t *lengths; /* [count] rows, 0: absent */
    const int64_t *starts, *ends; /* [count] where each one's place in the buffers is, in rows; padded with zeros */
    int64_t columns;
    const column *column; /* in the order of the chain of digests */
    int64_t chained;      /* columns of the first chain; those behind are the second one's */
    int32_t direct;       /* whether the files take direct reads alone */
    int32_t digests;      /* whether to make them */
    const uint8_t *keys;  /* [count, 32]: with them, the first seeds are mixed */
    uint64_t seed;
    const uint64_t *seeds;    /* [count]: without keys, the first seeds */
    const uint64_t *expected; /* [count], or NULL: nothing to compare with */
    const uint64_t *expected_more;
    uint64_t *sums, *more; /* [count] digests of the two chains, or NULL */
    uint8_t *state;        /* [count] 0 where all is well, else one of these: */
    int64_t part;          /* entries that a thread takes at a time */
    int64_t looks, looked; /* pages to look at first, at most, and the column whose they are; 0: none */
    int32_t streams;       /* whether to copy past the processor's caches */
    _Atomic int64_t bad;   /* entries whose state is not 0 */
    _Atomic int32_t error; /* errno of a read that failed */
} batch;

enum { INTACT, CORRUPT, OUTSIDE, SHORT, FAILED, NOWHERE /* its target is beyond the buffer */ };

static const uint64_t primes[5] = {0x9E3779B185EBCA87u, 0xC2B2AE3D27D4EB4Fu, 0x165667B19E3779F9u, 0x85EBCA77C2B2AE63u,
                                   0x27D4EB2F165667C5u};

static uint64_t first_seed(const batch *this, int64_t i) {
    if (this->keys == NULL) return this->seeds[i];
    uint64_t words[4], mixed = this->seed ^ ((uint64_t)this->lengths[i] * primes[4]);
    memcpy(words, this->keys + i * KEY_BYTES, KEY_BYTES);
    for (int n = 0; n < 4; n++) mixed ^= words[n] * primes[n];
    return mixed;
}

/* What a thread keeps between entries: memory, and what zstd needs. */
typedef struct {
    uint8_t *pages; /* of direct reads */
    uint8_t *memory[3]; /* planes of numbers, frames, rows on their way to their places */
    size_t sizes[3];
    void *decoder, *encoder;
} thread_own;

static void free_own(void *given) {
    thread_own *own = given;
    free(own->pages);
    for (int n = 0; n < 3; n++) free(own->memory[n]);
    if (own->decoder != NULL) zstd.free_decoder(own->decoder);
    if (own->encoder != NULL) zstd.free_encoder(own->encoder);
    free(own);
}

static thread_own *get_own(void) {
    thread_own *own = pthread_getspecific(scratch_key);
    if (own == NULL && (own = calloc(1, sizeof *own)) != NULL) pthread_setspecific(scratch_key, own);
    return own;
}

static uint8_t *scratch(void) {
    thread_own *own = get_own();
    void *made;
    if (own == NULL) return NULL;
    if (own->pages == NULL && posix_memalign(&made, HUGE, HUGE) == 0) {
        own->pages = made;
#ifdef MADV_HUGEPAGE /* a disk that is given memory page by page brings a third less */
        madvise(made, HUGE, MADV_HUGEPAGE);
#endif
    }
    return own->pages;
}

static uint8_t *memory_of(thread_own *own, int which, size_t nbytes) {
    if (own->sizes[which] < nbytes) {
        free(own->memory[which]);
        own->memory[which] = malloc(nbytes);
        own->sizes[which] = own->memory[which] == NULL ? 0 : nbytes;
    }
    return own->memory[which];
}

/* Read bytes of a file; direct reads bring whole pages, of which a copy is made. */
static int read_file(int file, int64_t place, int64_t nbytes, uint8_t *out, int direct, _Atomic int32_t *error) {
    uint8_t *pages = NULL;
    if (direct && (pages = scratch()) == NULL) {
        atomic_store(error, ENOMEM);
        return FAILED;
    }
    while (nbytes > 0) {
        int64_t piece = nbytes < PIECE ? nbytes : PIECE;
        int64_t skipped = direct ? place % PAGE : 0;
        int64_t asked = direct ? (skipped + piece + PAGE - 1) / PAGE * PAGE : piece;
        ssize_t read = pread(file, direct ? pages : out, (size_t)asked, (off_t)(place - skipped));
        if (read < 0) {
            if (errno == EINTR) continue;
            atomic_store(error, errno);
            return FAILED;
        }
        int64_t brought = read - skipped < piece ? read - skipped : piece;
        if (brought <= 0) return SHORT;
        if (direct) memcpy(out, pages + skipped, (size_t)brought);
        out += brought;
        place += brought;
        nbytes -= brought;
    }
    return INTACT;
}

/* Return whether all pages of some mapped bytes are in memory. */
static int is_resident(const uint8_t *data, int64_t nbytes) {
    unsigned char pages[256];
    long page = sysconf(_SC_PAGESIZE);
    uintptr_t begin = (uintptr_t)data / (uintptr_t)page * (uintptr_t)page, end = (uintptr_t)data + (uintptr_t)nbytes;
    while (begin < end) {
        size_t count = (end - begin + (uintptr_t)page - 1) / (uintptr_t)page;
        if (count > sizeof pages) count = sizeof pages;
#ifdef __APPLE__
        if (mincore((void *)begin, count * (size_t)page, (char *)pages) != 0) return 0;
#else
        if (mincore((void *)begin, count * (size_t)page, pages) != 0) return 0;
#endif
        for (size_t i = 0; i < count; i++)
            if (!(pages[i] & 1)) return 0;
        begin += count * (size_t)page;
    }
    return 1;
}

/* Copy past the processor's caches: a batch that they cannot hold would first be read into them to be written, and push
 * out what is read next. What is written so is seen by other threads after ``streamed``. */
#if defined(__x86_64__)
static void stream(uint8_t *out, const uint8_t *rows, int64_t nbytes) {
    int64_t head = -(intptr_t)out & 15, i = 0;
    if (head > nbytes) head = nbytes;
    memcpy(out, rows, (size_t)head);
    out += head;
    rows += head;
    nbytes -= head;
    for (; i + 64 <= nbytes; i += 64) {
        const __m128i *from = (const __m128i *)(rows + i);
        __m128i a = _mm_loadu_si128(from), b = _mm_loadu_si128(from + 1), c = _mm_loadu_si128(from + 2),
                d = _mm_loadu_si128(from + 3), *to = (__m128i *)(out + i);
        _mm_stream_si128(to, a);
        _mm_stream_si128(to + 1, b);
        _mm_stream_si128(to + 2, c);
        _mm_stream_si128(to + 3, d);
    }
    memcpy(out + i, rows + i, (size_t)(nbytes - i));
}
static void stream_zeros(uint8_t *out, int64_t nbytes) {
    int64_t head = -(intptr_t)out & 15, i = 0;
    if (head > nbytes) head = nbytes;
    memset(out, 0, (size_t)head);
    out += head;
    nbytes -= head;
    for (; i + 16 <= nbytes; i += 16) _mm_stream_si128((__m128i *)(out + i), _mm_setzero_si128());
    memset(out + i, 0, (size_t)(nbytes - i));
}
static void streamed(void) { _mm_sfence(); }
#else
static void stream(uint8_t *out, const uint8_t *rows, int64_t nbytes) { memcpy(out, rows, (size_t)nbytes); }
static void stream_zeros(uint8_t *out, int64_t nbytes) { memset(out, 0, (size_t)nbytes); }
static void streamed(void) {}
#endif
/* --- frames of zstd ---------------------------------------------------------------------------------------------------- */

/* Put the bytes of numbers back: plane after plane becomes number after number. */
static void unshuffle(const uint8_t *planes, uint8_t *out, int64_t count, int64_t item) {
    int64_t i = 0;
#if defined(__x86_64__)
    if (item == 2) {
        for (; i + 16 <= count; i += 16) {
            __m128i low = _mm_loadu_si128((const __m128i *)(planes + i));
            __m128i high = _mm_loadu_si128((const __m128i *)(planes + count + i));
            _mm_storeu_si128((__m128i *)(out + 2 * i), _mm_unpacklo_epi8(low, high));
            _mm_storeu_si128((__m128i *)(out + 2 * i + 16), _mm_unpackhi_epi8(low, high));
        }
    } else if (item == 4) {
        for (; i + 16 <= count; i += 16) {
            __m128i plane[4];
            for (int n = 0; n < 4; n++) plane[n] = _mm_loadu_si128((const __m128i *)(planes + n * count + i));
            __m128i a = _mm_unpacklo_epi8(plane[0], plane[1]), b = _mm_unpackhi_epi8(plane[0], plane[1]);
            __m128i c = _mm_unpacklo_epi8(plane[2], plane[3]), d = _mm_unpackhi_epi8(plane[2], plane[3]);
            _mm_storeu_si128((__m128i *)(out + 4 * i), _mm_unpacklo_epi16(a, c));
            _mm_storeu_si128((__m128i *)(out + 4 * i + 16), _mm_unpackhi_epi16(a, c));
            _mm_storeu_si128((__m128i *)(out + 4 * i + 32), _mm_unpacklo_epi16(b, d));
            _mm_storeu_si128((__m128i *)(out + 4 * i + 48), _mm_unpackhi_epi16(b, d));
        }
    }
#endif
    for (; i < count; i++)
        for (int64_t n = 0; n < item; n++) out[i * item + n] = planes[n * count + i];
}

static void shuffle(const uint8_t *data, uint8_t *planes, int64_t count, int64_t item) {
    int64_t i = 0;
#if defined(__x86_64__)
    if (item == 2) {
        const __m128i low_bytes = _mm_set1_epi16(0xFF);
        for (; i + 16 <= count; i += 16) {
            __m128i a = _mm_loadu_si128((const __m128i *)(data + 2 * i));
            __m128i b = _mm_loadu_si128((const __m128i *)(data + 2 * i + 16));
            __m128i low = _mm_packus_epi16(_mm_and_si128(a, low_bytes), _mm_and_si128(b, low_bytes));
            _mm_storeu_si128((__m128i *)(planes + i), low);
            _mm_storeu_si128((__m128i *)(planes + count + i), _mm_packus_epi16(_mm_srli_epi16(a, 8), _mm_srli_epi16(b, 8)));
        }
    }
#endif
    for (; i < count; i++)
        for (int64_t n = 0; n < item; n++) planes[n * count + i] = data[i * item + n];
}

/* Make the bytes of an entry's rows of its frames. What a frame says of its size is looked at before it is believed. */
static int decode_frames(thread_own *own, const uint8_t *frame, int64_t size, uint8_t *out, int64_t nbytes,
                         int64_t item) {
    uint8_t *planes = out;
    size_t left = (size_t)size, count = (size_t)(nbytes / item);
    if (own->decoder == NULL && (own->decoder = zstd.new_decoder()) == NULL) return FAILED;
    if (item > 1 && (planes = memory_of(own, 0, (size_t)nbytes)) == NULL) return FAILED;
    for (int64_t n = 0; n < item; n++) {
        size_t taken = zstd.frame_size(frame, left);
        if (zstd.is_error(taken) || taken > left || zstd.content_size(frame, taken) != count) return CORRUPT;
        size_t made = zstd.decode(own->decoder, planes + (size_t)n * count, count, frame, taken);
        if (zstd.is_error(made) || made != count) return CORRUPT;
        frame += taken;
        left -= taken;
    }
    if (left > 0) return CORRUPT;
    if (item > 1) unshuffle(planes, out, (int64_t)count, item);
    return INTACT;
}

static int64_t frames_bound(int64_t nbytes, int64_t item) {
    return item * (int64_t)zstd.bound((size_t)(nbytes / item));
}

static int bring_frame(batch *this, const column *of, int64_t i, uint8_t *out, int64_t nbytes) {
    int64_t size = of->sizes[i];
    const uint8_t *frame = NULL;
    thread_own *own = get_own();
    if (zstd.decode == NULL || out == NULL || of->item < 1 || nbytes % of->item) return OUTSIDE;
    if (size <= 0 || size > frames_bound(nbytes, of->item)) return CORRUPT; /* no writer makes them larger */
    if (of->base != NULL) {
        int64_t begin = of->begins[i];
        if (begin < 0 || size > of->size || begin > of->size - size) return OUTSIDE;
        frame = of->base + begin;
    }
    if (own != NULL && of->files != NULL && (frame == NULL || !is_resident(frame, size))) {
        uint8_t *memory = memory_of(own, 1, (size_t)size);
        int state = memory == NULL ? FAILED : read_file(of->files[i], of->places[i], size, memory, this->direct, &this->error);
        if (memory != NULL && state != INTACT) return state;
        frame = memory;
    }
    int state = own == NULL || (frame == NULL && of->files != NULL) ? FAILED
                : frame == NULL                                     ? OUTSIDE
                                                                    : decode_frames(own, frame, size, out, nbytes, of->item);
    if (state == FAILED) atomic_store(&this->error, ENOMEM);
    return state;
}

/* --- pooling: one row an entry ------------------------------------------------------------------------------------------- */

#define POOLED 64 /* rows whose sums are made in single precision, before they are added to those in double */

static uint32_t bits_of(float number) {
    uint32_t bits;
    memcpy(&bits, &number, 4);
    return bits;
}

static float float_of(uint32_t bits) {
    float number;
    memcpy(&number, &bits, 4);
    return number;
}

/* Return the float of a float16: its bits moved, times what the exponents differ by; infinities and NaN stay so. */
static float float_of_half(uint16_t half) {
    uint32_t bits = (uint32_t)(half & 0x7FFF) << 13;
    uint32_t size = bits_of(float_of(bits) * 5192296858534827628530496329220096.0f); /* 2 to the power of 112 */
    if ((half & 0x7C00) == 0x7C00) size = bits | 0x7F800000u;
    return float_of(size | (uint32_t)(half & 0x8000) << 16);
}

static float number_at(const uint8_t *row, int64_t c, int32_t form) {
    if (form == FLOAT32) {
        float number;
        memcpy(&number, row + 4 * c, 4);
        return number;
    }
    uint16_t bits;
    memcpy(&bits, row + 2 * c, 2);
    return form == FLOAT16 ? float_of_half(bits) : float_of((uint32_t)bits << 16);
}

#if defined(__x86_64__)
#define EIGHT __attribute__((target("avx2,f16c"), always_inline)) static inline

EIGHT __m256 eight_at(const uint8_t *row, int64_t c, int32_t form) {
    if (form == FLOAT32) return _mm256_loadu_ps((const float *)(const void *)(row + 4 * c));
    __m128i bits = _mm_loadu_si128((const __m128i *)(const void *)(row + 2 * c));
    return form == FLOAT16 ? _mm256_cvtph_ps(bits) : _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

/* Pool some rows, 32 columns at a time, which stay in registers; return how many columns are done. What the rows before
 * them came to is in ``sums`` or ``out``, unless they are the first ones. */
EIGHT int64_t pool_columns(const uint8_t *rows, int64_t count, int64_t width, int32_t form, int32_t way, int first,
                           double *sums, float *out) {
    int64_t c = 0, row_bytes = width * (form == FLOAT32 ? 4 : 2);
    for (; c + 32 <= width; c += 32) {
        __m256 so_far[4];
        for (int n = 0; n < 4; n++)
            so_far[n] = first ? eight_at(rows, c + 8 * n, form) : way == MEAN ? _mm256_setzero_ps() : _mm256_loadu_ps(out + c + 8 * n);
        for (int64_t i = first; i < count; i++) {
            const uint8_t *row = rows + i * row_bytes;
            for (int n = 0; n < 4; n++) {
                __m256 numbers = eight_at(row, c + 8 * n, form);
                so_far[n] = way == MEAN ? _mm256_add_ps(so_far[n], numbers) : _mm256_max_ps(so_far[n], numbers);
            }
        }
        for (int n = 0; n < 4; n++) {
            if (sums == NULL) {
                _mm256_storeu_ps(out + c + 8 * n, so_far[n]);
                continue;
            }
            double *sum = sums + c + 8 * n;
            __m256d low = _mm256_cvtps_pd(_mm256_castps256_ps128(so_far[n]));
            __m256d high = _mm256_cvtps_pd(_mm256_extractf128_ps(so_far[n], 1));
            _mm256_storeu_pd(sum, first ? low : _mm256_add_pd(_mm256_loadu_pd(sum), low));
            _mm256_storeu_pd(sum + 4, first ? high : _mm256_add_pd(_mm256_loadu_pd(sum + 4), high));
        }
    }
    return c;
}

#define POOL_COLUMNS(name, form, way)                                                                                  \
    __attribute__((target("avx2,f16c"))) static int64_t name(const uint8_t *rows, int64_t count, int64_t width,        \
                                                             int first, double *sums, float *out) {                    \
        return pool_columns(rows, count, width, form, way, first, sums, out);                                          \
    }
POOL_COLUMNS(mean_float32, FLOAT32, MEAN)
POOL_COLUMNS(mean_float16, FLOAT16, MEAN)
POOL_COLUMNS(mean_bfloat16, BFLOAT16, MEAN)
POOL_COLUMNS(largest_float32, FLOAT32, LARGEST)
POOL_COLUMNS(largest_float16, FLOAT16, LARGEST)
POOL_COLUMNS(largest_bfloat16, BFLOAT16, LARGEST)

typedef int64_t (*pooling)(const uint8_t *rows, int64_t count, int64_t width, int first, double *sums, float *out);
static const pooling poolings[2][3] = {{mean_float32, mean_float16, mean_bfloat16},
                                       {largest_float32, largest_float16, largest_bfloat16}};
#endif

/* Pool some rows: their sums, in double where ``sums`` is given, or the largest of each column. */
static void pool_some(const uint8_t *rows, int64_t count, int64_t width, int32_t form, int32_t way, int first,
                      double *sums, float *out) {
    int64_t c = 0, row_bytes = width * (form == FLOAT32 ? 4 : 2);
#if defined(__x86_64__)
    if (processor_has(AVX2 | F16C)) c = poolings[way == LARGEST][form](rows, count, width, first, sums, out);
#endif
    for (; c < width; c++) {
        float so_far = first ? number_at(rows, c, form) : way == MEAN ? 0 : out[c];
        for (int64_t i = first; i < count; i++) {
            float one = number_at(rows + i * row_bytes, c, form);
            so_far = way == MEAN ? so_far + one : one > so_far ? one : so_far;
        }
        if (sums == NULL)
            out[c] = so_far;
        else
            sums[c] = first ? so_far : sums[c] + so_far;
    }
}

/* Make the mean or the largest of each column of some rows, one or more. */
static int pool(const uint8_t *rows, int64_t count, int64_t width, int32_t form, int32_t way, float *out) {
    int64_t row_bytes = width * (form == FLOAT32 ? 4 : 2);
    double *sums = NULL;
    if (way == MEAN && count > POOLED) {
        thread_own *own = get_own();
        sums = own == NULL ? NULL : (double *)(void *)memory_of(own, 0, (size_t)width * sizeof *sums);
        if (sums == NULL) return FAILED;
    }
    for (int64_t first = 0; first < count; first += POOLED) /* so many stay in the processor's cache */
        pool_some(rows + first * row_bytes, count - first < POOLED ? count - first : POOLED, width, form, way, first == 0,
                  sums, out);
    for (int64_t c = 0; way == MEAN && c < width; c++)
        out[c] = sums == NULL ? out[c] / (float)count : (float)(sums[c] / (double)count);
    return INTACT;
}

/* --- from where rows are to where they belong ----------------------------------------------------------------------------- */

/* Copy the rows of an entry to their targets, one by one. */
static int put_on_targets(const batch *this, const column *of, int64_t i, const uint8_t *rows) {
    const int64_t *targets = of->targets + this->starts[i];
    int streams = this->streams && of->row_bytes >= SMALL;
    for (int64_t n = 0; n < this->lengths[i]; n++, rows += of->row_bytes) {
        if (targets[n] < 0 || targets[n] >= of->room) return NOWHERE;
        uint8_t *out = of->out + targets[n] * of->apart;
        if (streams)
            stream(out, rows, of->row_bytes);
        else if (of->row_bytes == sizeof(int32_t)) /* token ids */
            memcpy(out, rows, sizeof(int32_t));
        else
            memcpy(out, rows, (size_t)of->row_bytes);
    }
    return INTACT;
}

/* Put what an entry comes to into its row of the buffer. */
static int put_one(batch *this, const column *of, int64_t i, const uint8_t *rows) {
    if (i >= of->room) return NOWHERE;
    uint8_t *out = of->out + i * of->apart;
    if (of->way == ONE) {
        if (of->targets[i] < 0 || of->targets[i] >= this->lengths[i]) return NOWHERE;
        memcpy(out, rows + of->targets[i] * of->row_bytes, (size_t)of->row_bytes);
        return INTACT;
    }
    int64_t width = of->row_bytes / (of->form == FLOAT32 ? 4 : 2);
    int state = pool(rows, this->lengths[i], width, of->form, of->way, (float *)(void *)out);
    if (state == FAILED) atomic_store(&this->error, ENOMEM);
    return state;
}

/* Copy the rows of an entry to where they belong. */
static int put(batch *this, const column *of, int64_t i, const uint8_t *rows) {
    if (of->way == SCATTERED) return put_on_targets(this, of, i, rows);
    if (of->way != PACKED) return put_one(this, of, i, rows);
    uint8_t *out = of->out + this->starts[i] * of->row_bytes;
    int64_t nbytes = this->lengths[i] * of->row_bytes;
    if (this->streams)
        stream(out, rows, nbytes);
    else
        memcpy(out, rows, (size_t)nbytes);
    return INTACT;
}

/* Find the rows of an entry, or have them read; say where they are, and whether they are still to be ``put``. */
static int bring(batch *this, const column *of, int64_t i, const uint8_t **rows, int *to_put) {
    int64_t nbytes;
    if (__builtin_mul_overflow(this->lengths[i], of->row_bytes, &nbytes)) return OUTSIDE;
    if (this->lengths[i] > this->ends[i] - this->starts[i]) return OUTSIDE; /* no room for it */
    const uint8_t *mapped = NULL;
    *to_put = of->out != NULL;
    if (of->base != NULL && of->sizes == NULL) {
        int64_t begin = of->begins[i];
        if (begin < 0 || nbytes > of->size || begin > of->size - nbytes) return OUTSIDE;
        mapped = of->base + begin;
    }
    int is_read = of->files != NULL && of->sizes == NULL && (mapped == NULL || !is_resident(mapped, nbytes));
    if (!is_read && of->sizes == NULL) {
        *rows = mapped;
        return mapped == NULL ? OUTSIDE : INTACT;
    }
    if (of->out == NULL) return OUTSIDE;
    uint8_t *out = NULL;
    *to_put = of->way != PACKED;
    if (*to_put) { /* by way of memory of this thread's */
        thread_own *own = get_own();
        if (own == NULL || (out = memory_of(own, 2, (size_t)nbytes)) == NULL) {
            atomic_store(&this->error, ENOMEM);
            return FAILED;
        }
    } else {
        out = of->out + this->starts[i] * of->row_bytes;
    }
    int state = is_read ? read_file(of->files[i], of->places[i], nbytes, out, this->direct, &this->error)
                        : bring_frame(this, of, i, out, nbytes);
    if (state == INTACT) *rows = out;
    return state;
}

static void zeros(uint8_t *out, int64_t nbytes) { memset(out, 0, (size_t)nbytes); }

static int gather_one(batch *this, int64_t i) {
    int state = INTACT;
    uint64_t digest = this->digests ? first_seed(this, i) : 0;
    for (int64_t c = 0; c < this->columns; c++) {
        const column *of = this->column + c;
        const uint8_t *rows = NULL;
        int64_t nbytes;
        int to_put = 0;
        (void)__builtin_mul_overflow(this->lengths[i], of->row_bytes, &nbytes); /* ``bring`` refuses what overflows */
        if (this->lengths[i] > 0 && (state == INTACT || state == CORRUPT)) {
            int brought = bring(this, of, i, &rows, &to_put);
            if (brought != INTACT) state = brought;
            if (brought == CORRUPT) continue; /* a frame, in whose rows there is nothing to digest */
            if (brought != INTACT) to_put = 0;
        }
        int later = this->digests && ((this->streams && nbytes >= LONG) || of->way >= MEAN);
        if (to_put && !later) {
            int there = put(this, of, i, rows);
            if (there != INTACT) state = there;
            /* What is in the caches now is digested: the copy, unless it went past them. */
            if (!this->streams && of->way == PACKED && state != NOWHERE) rows = of->out + this->starts[i] * of->row_bytes;
        }
        if (of->out != NULL && of->way == PACKED && state != OUTSIDE) { /* padding */
            int64_t end = this->starts[i] + this->lengths[i];
            if (end < this->ends[i])
                (this->streams ? stream_zeros : zeros)(of->out + end * of->row_bytes,
                                                       (this->ends[i] - end) * of->row_bytes);
        }
        if (!this->digests || rows == NULL) continue;
        if (c == this->chained) { /* the second chain begins with the digest that the first one should have */
            if (this->sums != NULL && c > 0) this->sums[i] = digest;
            if (this->expected != NULL && c > 0 && digest != this->expected[i]) state = CORRUPT;
            if (this->expected != NULL) digest = this->expected[i];
        }
        digest = digest_of(rows, (size_t)nbytes, digest);
        if (to_put && later) {
            int there = put(this, of, i, rows);
            if (there != INTACT) state = there;
        }
    }
    if (!this->digests || this->lengths[i] == 0 || (state != INTACT && state != CORRUPT)) return state;
    if (this->chained < this->columns) {
        if (this->more != NULL) this->more[i] = digest;
        if (this->expected_more != NULL && digest != this->expected_more[i]) state = CORRUPT;
    } else {
        if (this->sums != NULL) this->sums[i] = digest;
        if (this->expected != NULL && digest != this->expected[i]) state = CORRUPT;
    }
    return state;
}

static void gather_part(void *context, int64_t part) {
    batch *this = context;
    int64_t last = (part + 1) * this->part;
    if (last > this->count) last = this->count;
    for (int64_t i = part * this->part; i < last; i++) {
        int state = gather_one(this, i);
        this->state[i] = (uint8_t)state;
        if (state != INTACT) atomic_fetch_add(&this->bad, 1);
    }
    if (this->streams) streamed();
}

static int64_t bytes_of(const column *of, const int64_t *lengths, int64_t i) {
    return of->sizes != NULL ? of->sizes[i] : lengths[i] * of->row_bytes;
}

/* Return how many of ``pages`` addresses, evenly spread over the rows of entries, are not in memory. */
static int64_t absent_pages(const column *of, int64_t count, const int64_t *lengths, int64_t total, int64_t pages) {
    int64_t absent = 0, entry = 0, before = 0;
    for (int64_t n = 0; n < pages && total > 0; n++) {
        int64_t at = pages == 1 ? 0 : (int64_t)((double)(total - 1) * (double)n / (double)(pages - 1));
        while (entry < count && at >= before + bytes_of(of, lengths, entry)) before += bytes_of(of, lengths, entry++);
        if (entry == count) break;
        int64_t place = of->begins[entry] + (at - before);
        if (place >= 0 && place < of->size) absent += !is_resident(of->base + place, 1);
    }
    return absent;
}

#define BYTES_A_LOOK (256 << 10)

/* Return whether some rows seem not to be in memory: ``most`` pages are looked at, fewer of a small batch. */
static int seems_absent(const column *of, int64_t count, const int64_t *lengths, int64_t most) {
    int64_t rows = 0, total = 0;
    if (of->base == NULL) return 0;
    for (int64_t i = 0; i < count; i++) rows += of->sizes != NULL ? of->sizes[i] : lengths[i];
    if (__builtin_mul_overflow(rows, of->sizes != NULL ? 1 : of->row_bytes, &total)) return 0;
    int64_t pages = 1 + total / BYTES_A_LOOK;
    if (pages > most) pages = most;
    return absent_pages(of, count, lengths, total, pages) > 0;
}

PUBLIC int32_t act_seems_absent(const column *of, int64_t count, const int64_t *lengths, int64_t most) {
    return seems_absent(of, count, lengths, most);
}

/* Bring the rows of a batch into its buffers, padding included; return how many entries are not well, or -1 where it
 * seems not to be in memory and ``looks`` asks for that. */
PUBLIC int64_t act_gather(batch *this, int32_t threads) {
    int64_t nbytes = 0, rows = 0;
    pthread_once(&once, prepare);
    if (this->looks > 0 && seems_absent(this->column + this->looked, this->count, this->lengths, this->looks)) return -1;
    for (int64_t c = 0; c < this->columns; c++) nbytes += this->column[c].row_bytes;
    for (int64_t i = 0; i < this->count; i++) rows += this->ends[i] - this->starts[i];
    nbytes *= rows;
    this->streams = nbytes >= STREAM;
    for (int64_t c = 0; c < this->columns; c++) { /* the buffer of a mix is filled by several batches */
        const column *of = this->column + c;
        if (of->way == SCATTERED) this->streams |= of->room * of->row_bytes >= STREAM;
    }
    if (this->part <= 0) this->part = this->count * PART / (nbytes > 0 ? nbytes : 1);
    if (this->part <= 0) this->part = 1;
    int reads = 0;
    for (int64_t c = 0; c < this->columns; c++) reads |= this->column[c].files != NULL;
    if (!reads && threads > 1 + nbytes / SHARE) threads = (int32_t)(1 + nbytes / SHARE);
    if (reads) this->part = 1; /* every thread waits for its own */
    share(gather_part, this, (this->count + this->part - 1) / this->part, threads);
    return this->bad;
}

/* --- a batch by one call: looked up, planned, brought and compared ---------------------------------------------------- */

#define READ_COLUMNS 2

typedef struct {
    int64_t row_bytes;
    const uint8_t *base; /* mapped memory */
    int64_t size;
    const int64_t *firsts; /* [segments] the first row of each in it, negative where it is not mapped */
    int64_t unit;          /* bytes of what rows of the tables count: rows of this column, or pages */
    int64_t at, before;    /* where an entry's rows begin after that: a byte, and bytes for each of its tokens, then the
                              next multiple of 8; both are 0 where rows are counted */
    uint8_t *out;
    int32_t way, form; /* these, and what follows, as of a column */
    const int64_t *targets;
    int64_t apart, room;
} mapped_column;

typedef struct {
    /* What a snapshot is: made once for all of its batches. */
    int64_t tables;
    const table *table;
    int64_t segments;
    const int64_t *limits, *names;
    int64_t columns;
    mapped_column column[READ_COLUMNS];
    int64_t looks, looked;
    /* The batch. */
    int64_t count;
    const uint8_t *keys;
    int64_t width; /* rows of each entry's place, negative: packed */
    int64_t room;  /* rows of the buffers, or how many targets there are */
    int32_t digests;
    uint64_t seed;
    int64_t *work; /* [6 + columns, count]: tokens, checksums, segment, row, starts, ends, begins; the first is the answer */
    uint8_t *state; /* [count] */
    int64_t total;  /* tokens of all entries */
} reading;

enum { NOT_IN_MEMORY = -1, NO_ROOM = -2, NOT_MAPPED = -3 };

/* Return how many entries are not well, or why the batch has to be read step by step. */
PUBLIC int64_t act_read(reading *this, int32_t threads) {
    int64_t n = this->count, *tokens = this->work, *segment = tokens + 2 * n, *row = tokens + 3 * n;
    int64_t *starts = tokens + 4 * n, *ends = tokens + 5 * n, *begins = tokens + 6 * n, longest = 0;
    lookup find = {.count = n, .keys = this->keys, .tables = this->tables, .table = this->table,
                   .segments = this->segments, .limits = this->limits, .names = this->names, .tokens = tokens,
                   .checksums = (uint64_t *)(tokens + n), .segment = segment, .row = row};
    column columns[READ_COLUMNS];
    act_locate(&find, threads);
    if (find.outside > 0) return NOT_MAPPED;
    this->total = 0;
    for (int64_t i = 0; i < n; i++) { /* a look-up compared tokens with the rows that a segment has: no sum overflows */
        starts[i] = this->width < 0 ? this->total : i * this->width;
        ends[i] = starts[i] + (this->width < 0 ? tokens[i] : this->width);
        this->total += tokens[i];
        if (tokens[i] > longest) longest = tokens[i];
    }
    if (this->width < 0 ? this->total > this->room : longest > this->width || n * this->width > this->room)
        return NO_ROOM;
    for (int64_t c = 0; c < this->columns; c++, begins += n) {
        const mapped_column *of = this->column + c;
        for (int64_t i = 0; i < n; i++) {
            if (tokens[i] == 0) {
                begins[i] = 0;
                continue;
            }
            if (of->firsts[segment[i]] < 0) return NOT_MAPPED;
            begins[i] = (of->firsts[segment[i]] + row[i]) * of->unit + ((of->at + tokens[i] * of->before + 7) & ~7);
        }
        columns[c] = (column){.row_bytes = of->row_bytes, .base = of->base, .size = of->size, .begins = begins,
                              .out = of->out, .item = 1, .way = of->way, .form = of->form,
                              .targets = of->targets, .apart = of->apart, .room = of->room};
    }
    memset(this->state, INTACT, (size_t)n);
    batch rows = {.count = n, .lengths = tokens, .starts = starts, .ends = ends, .columns = this->columns,
                  .column = columns, .chained = this->columns, .digests = this->digests, .keys = this->keys,
                  .seed = this->seed, .expected = find.checksums, .state = this->state, .looks = this->looks,
                  .looked = this->looked};
    return act_gather(&rows, threads);
}

/* --- mixing -------------------------------------------------------------------------------------------------------------- */

/* Shuffle the numbers 0 ... count - 1: each order is as likely, but for one in 2 to the power of 64 / count. The numbers
 * drawn are splitmix64's, so that the order is a function of the seed. */
PUBLIC void act_permute(int64_t *out, int64_t count, uint64_t seed) {
    for (int64_t i = 0; i < count; i++) {
        uint64_t drawn = seed += 0x9E3779B97F4A7C15u;
        drawn = (drawn ^ drawn >> 30) * 0xBF58476D1CE4E5B9u;
        drawn = (drawn ^ drawn >> 27) * 0x94D049BB133111EBu;
        drawn ^= drawn >> 31;
        int64_t other = (int64_t)(uint64_t)((unsigned __int128)drawn * (uint64_t)(i + 1) >> 64);
        out[i] = out[other];
        out[other] = i;
    }
}

/* --- conversion of what is written ------------------------------------------------------------------------------------- */

/* Round float32 to float16, ties to even; return 1, 0 where infinity or NaN came of it, -1 where the processor has no
 * instruction for it. */
#if defined(__x86_64__)
__attribute__((target("avx,f16c"))) static int halves(const float *rows, uint16_t *out, int64_t count) {
    const __m128i exponent = _mm_set1_epi16(0x7C00);
    __m128i odd = _mm_setzero_si128();
    int64_t i = 0;
    for (; i + 8 <= count; i += 8) {
        __m128i half = _mm256_cvtps_ph(_mm256_loadu_ps(rows + i), _MM_FROUND_TO_NEAREST_INT);
        odd = _mm_or_si128(odd, _mm_cmpeq_epi16(_mm_and_si128(half, exponent), exponent));
        _mm_storeu_si128((__m128i *)(out + i), half);
    }
    int bad = _mm_movemask_epi8(odd) != 0;
    for (; i < count; i++) {
        out[i] = (uint16_t)_mm_extract_epi16(_mm_cvtps_ph(_mm_set_ss(rows[i]), _MM_FROUND_TO_NEAREST_INT), 0);
        bad |= (out[i] & 0x7C00) == 0x7C00;
    }
    return !bad;
}

PUBLIC int32_t act_halves(const float *rows, uint16_t *out, int64_t count) {
    return processor_has(F16C) ? halves(rows, out, count) : -1;
}
#elif defined(__aarch64__)
PUBLIC int32_t act_halves(const float *rows, uint16_t *out, int64_t count) {
    int bad = 0;
    for (int64_t i = 0; i < count; i++) {
        __fp16 half = (__fp16)rows[i];
        memcpy(out + i, &half, sizeof half);
        bad |= (out[i] & 0x7C00) == 0x7C00;
    }
    return !bad;
}
#else
PUBLIC int32_t act_halves(const float *rows, uint16_t *out, int64_t count) {
    (void)rows, (void)out, (void)count;
    return -1;
}
#endif

/* --- frames of zstd that are written ------------------------------------------------------------------------------------- */

typedef struct {
    int64_t count;
    const uint8_t *data;  /* the rows of all entries */
    const int64_t *edges; /* [count + 1] where each begins in it, in bytes, and the end */
    int64_t item;
    int64_t room;         /* bytes of each entry's place in ``out``; the bound of the largest one */
    uint8_t *out;         /* [count, room] */
    int64_t *sizes;       /* [count] of each entry's frames; 0 where none could be made */
    _Atomic int32_t failed;
} framing;

/* Numbers repeat nothing that is worth a look: with matches, frames are larger and take twice as long to decode. */
static void *new_huffman_encoder(void) {
    const int level = 100, literals = 1002; /* ZSTD_c_compressionLevel, ZSTD_c_literalCompressionMode */
    void *encoder = zstd.new_encoder();
    if (encoder != NULL) {
        zstd.set(encoder, level, -1000);
        zstd.set(encoder, literals, 1); /* ZSTD_lcm_huffman; where it is not known, as that level does */
    }
    return encoder;
}

static void frame_part(void *context, int64_t i) {
    framing *this = context;
    thread_own *own = get_own();
    int64_t nbytes = this->edges[i + 1] - this->edges[i];
    const uint8_t *data = this->data + this->edges[i];
    this->sizes[i] = 0;
    if (own != NULL && own->encoder == NULL) own->encoder = new_huffman_encoder();
    uint8_t *planes = own == NULL || this->item == 1 ? NULL : memory_of(own, 0, (size_t)nbytes);
    if (own == NULL || own->encoder == NULL || (this->item > 1 && planes == NULL)) {
        atomic_store(&this->failed, 1);
        return;
    }
    if (this->item > 1) {
        shuffle(data, planes, nbytes / this->item, this->item);
        data = planes;
    }
    size_t count = (size_t)(nbytes / this->item), end = 0;
    for (int64_t n = 0; n < this->item; n++) {
        uint8_t *out = this->out + i * this->room + end;
        size_t size = zstd.encode(own->encoder, out, (size_t)this->room - end, data + (size_t)n * count, count);
        if (zstd.is_error(size)) {
            atomic_store(&this->failed, 1);
            return;
        }
        end += size;
    }
    this->sizes[i] = (int64_t)end;
}

/* Make frames of each entry's rows; return whether all of them could be made. */
PUBLIC int32_t act_frame(framing *this, int32_t threads) {
    pthread_once(&once, prepare);
    share(frame_part, this, this->count, threads);
    return !this->failed;
}

/* --- rows of codes with a scale a token ------------------------------------------------------------------------------- */

/* A stored row is a code of one byte for each number, then the row's scale as a float: number = code * scale. The lowest
 * byte of int8's scale is not the scale's, but the shape of its codes: see docs/format.md. */
typedef struct {
    int64_t rows, hidden;
    int32_t code; /* one of: */
    int32_t form; /* of the numbers, one of: */
    uint8_t *stored; /* [rows, hidden + 4] */
    void *numbers;   /* [rows, hidden] */
    _Atomic int64_t bad; /* rows with an infinity or a NaN, given or made */
} conversion;

enum { INT8, E4M3, PIECEWISE }; /* the last: int8 whose shape is another than LINEAR */

#define SCALE_BYTES 4
#define SMALLEST_SCALE 1.17549435e-38f /* rows of zeros have a scale, too */
#define SMALLEST_SCALE_E4M3 1e-12f     /* as vLLM's hs-connectors */
#define LARGEST_INT8 127
#define LARGEST_E4M3 448.0f

static int is_odd(float number) { return (bits_of(number) & 0x7F800000u) == 0x7F800000u; }

/* What the codes of a row of int8 mean, in units of its scale: as far as the knee themselves, beyond it ratio steps each.
 * The upper four bits of a shape are the knee's eighth, the lower four say the ratio: 2, 3, 4, 6, 8, 12, ... 256. */
#define LINEAR 0
#define RATIOS 15 /* how many there are */

static int is_shape(uint8_t shape) { return shape == LINEAR || (shape >= 16 && shape % 16 < RATIOS); }

static int32_t knee_of(uint8_t shape) { return shape == LINEAR ? LARGEST_INT8 : shape / 16 * 8; }

static int32_t ratio_of(uint8_t shape) { return shape == LINEAR ? 1 : (2 + (shape & 1)) << (shape % 16 / 2); }

/* Return what the largest code means. */
static int32_t range_of(uint8_t shape) { return knee_of(shape) + ratio_of(shape) * (LARGEST_INT8 - knee_of(shape)); }

/* Numbers are counted by how far they are below a row's largest, in sixteenths of an octave. */
#define BINS 192
#define SMALLEST_TO_SHAPE 1e-30f /* the largest number of rows whose reciprocal is no float of all its digits */

static int64_t bin_of(float share) {
    int64_t below = (int64_t)(bits_of(1.0f) >> 19) - (int64_t)((bits_of(share) & 0x7FFFFFFFu) >> 19);
    return below < 0 ? 0 : below >= BINS ? BINS - 1 : below;
}

typedef struct {
    uint8_t shape;
    int64_t bin;    /* of its knee: what is in those before it is beyond the knee */
    double weight;  /* its scale's square, where the largest number is 1 */
    int64_t beyond; /* how much more a number beyond the knee adds to the row's squared error than one below it */
} candidate;

static candidate candidates[1 + 15 * RATIOS];
static int64_t candidates_count;

static void prepare_candidates(void) {
    int64_t count = 0;
    for (int shape = 0; shape < 256; shape++) {
        if (!is_shape((uint8_t)shape)) continue;
        double range = range_of((uint8_t)shape), ratio = ratio_of((uint8_t)shape);
        candidates[count++] = (candidate){(uint8_t)shape, bin_of((float)(knee_of((uint8_t)shape) / range)),
                                          1.0 / (range * range), (int64_t)(ratio * ratio) - 1};
    }
    candidates_count = count;
}

static pthread_once_t once_for_candidates = PTHREAD_ONCE_INIT;

static float scale_of_digits(float scale) { /* 16 of them, rounded up: times a code's meaning it is nearly a float */
    scale = float_of((bits_of(scale) + 0xFFu) & ~0xFFu);
    return scale < SMALLEST_SCALE ? SMALLEST_SCALE : scale;
}

/* Return the scale of a row of e4m3 whose largest number is given: vLLM's. */
static float scale_of_e4m3(float largest) {
    float scale = largest / LARGEST_E4M3;
    return scale < SMALLEST_SCALE_E4M3 ? SMALLEST_SCALE_E4M3 : scale;
}

static float scale_of_int8(uint8_t shape, float largest) { return scale_of_digits(largest / (float)range_of(shape)); }

/* Round to nearest, ties to even, a number that is no larger than 2 to the power of 22. */
static float to_whole(float number) {
    float far = number < 0 ? -8388608.0f : 8388608.0f;
    return number + far - far;
}

static uint8_t int8_for(float scaled, float knee, float ratio) {
    float size = scaled < 0 ? -scaled : scaled;
    float whole = size > knee ? knee + to_whole((size - knee) / ratio) : to_whole(size);
    if (whole > LARGEST_INT8) whole = LARGEST_INT8;
    return (uint8_t)(int8_t)(scaled < 0 ? -whole : whole);
}

static uint8_t e4m3_for(float scaled) {
    uint32_t bits = bits_of(scaled), sign = bits >> 24 & 0x80, size = bits & 0x7FFFFFFFu;
    if (size < 0x3C800000u) return (uint8_t)(sign | (uint32_t)to_whole(float_of(size) * 512.0f)); /* below 2^-6 */
    return (uint8_t)(sign | (((size + 0x7FFFFu + (size >> 20 & 1)) >> 20) - 960u));
}

static float number_of_int8(uint8_t stored, int32_t knee, int32_t ratio) {
    int32_t code = (int8_t)stored, within = code > knee ? knee : code < -knee ? -knee : code;
    return (float)(within + ratio * (code - within));
}

static float number_of_e4m3(uint8_t stored) {
    uint32_t size = stored & 0x7Fu, sign = (uint32_t)(stored & 0x80u) << 24;
    if (size == 0x7F) return float_of(sign | 0x7FC00000u);
    if (size < 8) return stored & 0x80 ? -(float)size / 512.0f : (float)size / 512.0f;
    return float_of(sign | ((size + 960u) << 20));
}

static uint16_t half_of(float number) { /* to nearest, ties to even */
    uint32_t bits = bits_of(number), sign = bits >> 16 & 0x8000u, size = bits & 0x7FFFFFFFu;
    if (size >= 0x7F800000u) return (uint16_t)(sign | 0x7C00u | (size > 0x7F800000u ? 0x200u : 0));
    if (size >= 0x477FF000u) return (uint16_t)(sign | 0x7C00u);
    if (size < 0x38800000u) return (uint16_t)(sign | (uint32_t)to_whole(float_of(size) * 16777216.0f));
    return (uint16_t)(sign | ((size + 0xFFFu + (size >> 13 & 1) - 0x38000000u) >> 13));
}

static uint16_t bfloat_of(float number) {
    uint32_t bits = bits_of(number);
    if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return (uint16_t)(bits >> 16 | 0x40u);
    return (uint16_t)((bits + 0x7FFFu + (bits >> 16 & 1)) >> 16);
}

/* Widen some numbers of a row; return whether one of them is an infinity or a NaN. */
static int widen_some(int32_t code, int32_t form, const uint8_t *stored, float scale, uint8_t shape, void *out,
                      int64_t first, int64_t last) {
    int odd = 0;
    int32_t knee = knee_of(shape), ratio = ratio_of(shape);
    for (int64_t i = first; i < last; i++) {
        float number = (code == E4M3 ? number_of_e4m3(stored[i]) : number_of_int8(stored[i], knee, ratio)) * scale;
        if (form == FLOAT32) {
            ((float *)out)[i] = number;
            odd |= is_odd(number);
        } else if (form == FLOAT16) {
            ((uint16_t *)out)[i] = half_of(number);
            odd |= (((uint16_t *)out)[i] & 0x7C00) == 0x7C00;
        } else {
            ((uint16_t *)out)[i] = bfloat_of(number);
            odd |= (((uint16_t *)out)[i] & 0x7F80) == 0x7F80;
        }
    }
    return odd;
}

static void narrow_some(int32_t code, const float *numbers, float scale, uint8_t shape, uint8_t *out, int64_t first,
                        int64_t last) {
    float knee = (float)knee_of(shape), ratio = (float)ratio_of(shape);
    for (int64_t i = first; i < last; i++) {
        float scaled = numbers[i] / scale;
        out[i] = code == E4M3 ? e4m3_for(scaled) : int8_for(scaled, knee, ratio);
    }
}

/* Return whether int8 without a knee stores a row as it is, as it does one that was stored so before. */
static int is_linear(const float *numbers, int64_t hidden, float scale) {
    for (int64_t i = 0; i < hidden; i++) {
        if (to_whole(numbers[i] / scale) * scale != numbers[i]) return 0;
    }
    return 1;
}

/* Return the shape by which a row's squared error should be the least: a number is half a step off at most, as likely by
 * this as by that, but for the largest, which has a code; and those beyond the knee are as many as their bins have. */
static uint8_t shape_for(const float *numbers, int64_t hidden, float largest) {
    int32_t before[BINS + 1] = {0};
    if (largest < SMALLEST_TO_SHAPE) return LINEAR;
    float reciprocal = 1.0f / largest;
    for (int64_t i = 0; i < hidden; i++) before[bin_of(numbers[i] * reciprocal) + 1]++;
    for (int64_t bin = 1; bin <= BINS; bin++) before[bin] += before[bin - 1];
    const candidate *best = candidates;
    double least = best->weight * (double)(hidden - 1);
    for (int64_t n = 1; n < candidates_count; n++) {
        const candidate *one = candidates + n;
        double error = one->weight * (double)(hidden - 1 + (before[one->bin] - 1) * one->beyond);
        if (error < least) {
            least = error;
            best = one;
        }
    }
    if (best->shape != LINEAR && is_linear(numbers, hidden, scale_of_int8(LINEAR, largest))) return LINEAR;
    return best->shape;
}

static float largest_of(const float *numbers, int64_t first, int64_t last, float largest, int *odd) {
    for (int64_t i = first; i < last; i++) {
        float size = float_of(bits_of(numbers[i]) & 0x7FFFFFFFu);
        *odd |= is_odd(size);
        if (size > largest) largest = size;
    }
    return largest;
}

#if defined(__x86_64__)
#define VECTORS __attribute__((target("avx2,f16c")))
#define INLINE VECTORS static inline __attribute__((always_inline))

INLINE __m128i sixteen_bits_of(__m256i wide) { /* of each of 8 numbers the lower 16, where the others are zeros */
    __m256i packed = _mm256_packus_epi32(wide, wide);
    return _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
}

INLINE __m256i bfloats_of(__m256 numbers) { /* each in the lower half of its 32 bits */
    __m256i bits = _mm256_castps_si256(numbers);
    __m256i even = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    bits = _mm256_add_epi32(bits, _mm256_add_epi32(even, _mm256_set1_epi32(0x7FFF)));
    return _mm256_srli_epi32(bits, 16);
}

INLINE void store_sixteen(__m256 low, __m256 high, int32_t form, void *out, int64_t i) {
    if (form == FLOAT32) {
        _mm256_storeu_ps((float *)out + i, low);
        _mm256_storeu_ps((float *)out + i + 8, high);
    } else if (form == FLOAT16) {
        __m128i halves = _mm256_cvtps_ph(low, _MM_FROUND_TO_NEAREST_INT);
        __m256i both = _mm256_inserti128_si256(_mm256_castsi128_si256(halves),
                                               _mm256_cvtps_ph(high, _MM_FROUND_TO_NEAREST_INT), 1);
        _mm256_storeu_si256((__m256i *)((uint16_t *)out + i), both);
    } else {
        __m256i both = _mm256_packus_epi32(bfloats_of(low), bfloats_of(high)); /* within each half of a vector */
        _mm256_storeu_si256((__m256i *)((uint16_t *)out + i), _mm256_permute4x64_epi64(both, 0xD8));
    }
}

INLINE int64_t widen_vectors(int32_t code, int32_t form, const uint8_t *stored, float scale, uint8_t shape, void *out,
                             int64_t hidden, int *odd) {
    const __m256 by = _mm256_set1_ps(code == E4M3 ? scale * 256.0f : scale);
    const __m128i knee = _mm_set1_epi8((char)knee_of(shape)), below = _mm_set1_epi8((char)-knee_of(shape));
    const __m128i steps = _mm_set1_epi16((int16_t)(1 | (ratio_of(shape) - 1) << 8)); /* 1, ratio - 1, 1, ... */
    __m256i unusual = _mm256_setzero_si256();
    int64_t i = 0;
    for (; i + 16 <= hidden; i += 16) {
        __m128i codes = _mm_loadu_si128((const __m128i *)(stored + i));
        __m256 low, high;
        if (code == INT8) {
            low = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(codes));
            high = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_unpackhi_epi64(codes, codes)));
        } else if (code == PIECEWISE) { /* each with what it has beyond the knee beside it */
            __m128i beyond = _mm_sub_epi8(codes, _mm_max_epi8(_mm_min_epi8(codes, knee), below));
            __m128i first = _mm_maddubs_epi16(steps, _mm_unpacklo_epi8(codes, beyond));
            __m128i second = _mm_maddubs_epi16(steps, _mm_unpackhi_epi8(codes, beyond));
            low = _mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(first));
            high = _mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(second));
        } else { /* with its bits in the places of a half's it is 256 times as small; the scale makes up for that */
            __m256i bits = _mm256_slli_epi16(_mm256_cvtepi8_epi16(codes), 7);
            __m256i size = _mm256_and_si256(bits, _mm256_set1_epi16(0x3F80));
            unusual = _mm256_or_si256(unusual, _mm256_cmpeq_epi16(size, _mm256_set1_epi16(0x3F80)));
            bits = _mm256_andnot_si256(_mm256_set1_epi16(0x4000), bits);
            low = _mm256_cvtph_ps(_mm256_castsi256_si128(bits));
            high = _mm256_cvtph_ps(_mm256_extracti128_si256(bits, 1));
        }
        store_sixteen(_mm256_mul_ps(low, by), _mm256_mul_ps(high, by), form, out, i);
    }
    *odd |= _mm256_movemask_epi8(unusual) != 0;
    return i;
}

#define WIDEN(name, code, form)                                                                                        \
    VECTORS static int64_t name(const uint8_t *stored, float scale, uint8_t shape, void *out, int64_t hidden,          \
                                int *odd) {                                                                            \
        return widen_vectors(code, form, stored, scale, shape, out, hidden, odd);                                      \
    }
WIDEN(int8_to_float, INT8, FLOAT32)
WIDEN(int8_to_half, INT8, FLOAT16)
WIDEN(int8_to_bfloat, INT8, BFLOAT16)
WIDEN(e4m3_to_float, E4M3, FLOAT32)
WIDEN(e4m3_to_half, E4M3, FLOAT16)
WIDEN(e4m3_to_bfloat, E4M3, BFLOAT16)
WIDEN(piecewise_to_float, PIECEWISE, FLOAT32)
WIDEN(piecewise_to_half, PIECEWISE, FLOAT16)
WIDEN(piecewise_to_bfloat, PIECEWISE, BFLOAT16)

typedef int64_t (*widening)(const uint8_t *stored, float scale, uint8_t shape, void *out, int64_t hidden, int *odd);
static const widening widenings[3][3] = {{int8_to_float, int8_to_half, int8_to_bfloat},
                                         {e4m3_to_float, e4m3_to_half, e4m3_to_bfloat},
                                         {piecewise_to_float, piecewise_to_half, piecewise_to_bfloat}};

VECTORS static int64_t largest_vectors(const float *numbers, int64_t hidden, float *largest, int *odd) {
    const __m256i sizes = _mm256_set1_epi32(0x7FFFFFFF);
    __m256i most = _mm256_setzero_si256(); /* sizes of floats are in the order of their bits */
    int64_t i = 0;
    for (; i + 8 <= hidden; i += 8)
        most = _mm256_max_epi32(most, _mm256_and_si256(_mm256_loadu_si256((const __m256i *)(numbers + i)), sizes));
    int32_t all[8];
    _mm256_storeu_si256((__m256i *)all, most);
    for (int n = 0; n < 8; n++) {
        *odd |= is_odd(float_of((uint32_t)all[n]));
        if (float_of((uint32_t)all[n]) > *largest) *largest = float_of((uint32_t)all[n]);
    }
    return i;
}

VECTORS static int64_t narrow_vectors(int32_t code, const float *numbers, float scale, uint8_t shape, uint8_t *out,
                                      int64_t hidden) {
    const __m256 by = _mm256_set1_ps(scale), ratio = _mm256_set1_ps((float)ratio_of(shape));
    const __m256 knee = _mm256_set1_ps((float)knee_of(shape));
    int64_t i = 0;
    for (; i + 8 <= hidden; i += 8) {
        __m256 scaled = _mm256_div_ps(_mm256_loadu_ps(numbers + i), by);
        __m256i codes;
        if (code == INT8) {
            __m256 size = _mm256_and_ps(scaled, _mm256_castsi256_ps(_mm256_set1_epi32(0x7FFFFFFF)));
            codes = _mm256_cvtps_epi32(size);
            if (shape != LINEAR) {
                __m256i beyond = _mm256_cvtps_epi32(_mm256_div_ps(_mm256_sub_ps(size, knee), ratio));
                beyond = _mm256_add_epi32(beyond, _mm256_set1_epi32(knee_of(shape)));
                __m256 is_beyond = _mm256_cmp_ps(size, knee, _CMP_GT_OQ);
                codes = _mm256_blendv_epi8(codes, beyond, _mm256_castps_si256(is_beyond));
            }
            codes = _mm256_min_epi32(codes, _mm256_set1_epi32(LARGEST_INT8));
            codes = _mm256_sign_epi32(codes, _mm256_castps_si256(scaled));
            codes = _mm256_and_si256(codes, _mm256_set1_epi32(0xFF));
        } else {
            __m256i bits = _mm256_castps_si256(scaled), size = _mm256_and_si256(bits, _mm256_set1_epi32(0x7FFFFFFF));
            __m256i even = _mm256_and_si256(_mm256_srli_epi32(size, 20), _mm256_set1_epi32(1));
            __m256i usual = _mm256_add_epi32(size, _mm256_add_epi32(even, _mm256_set1_epi32(0x7FFFF)));
            usual = _mm256_sub_epi32(_mm256_srli_epi32(usual, 20), _mm256_set1_epi32(960));
            __m256 small = _mm256_mul_ps(_mm256_castsi256_ps(size), _mm256_set1_ps(512.0f));
            __m256i is_small = _mm256_cmpgt_epi32(_mm256_set1_epi32(0x3C800000), size);
            codes = _mm256_blendv_epi8(usual, _mm256_cvtps_epi32(small), is_small);
            __m256i sign = _mm256_and_si256(_mm256_srli_epi32(bits, 24), _mm256_set1_epi32(0x80));
            codes = _mm256_or_si256(codes, sign);
        }
        __m128i words = sixteen_bits_of(codes);
        _mm_storel_epi64((__m128i *)(out + i), _mm_packus_epi16(words, words));
    }
    return i;
}
#endif

/* Rows that a thread takes at a time. */
static int64_t rows_of_part(const conversion *this) { return 1 + PART / (this->hidden + 1); }

static void widen_part(void *context, int64_t part) {
    conversion *this = context;
    int64_t first = part * rows_of_part(this), last = first + rows_of_part(this), bad = 0;
    int64_t size = this->form == FLOAT32 ? 4 : 2;
    if (last > this->rows) last = this->rows;
    for (int64_t row = first; row < last; row++) {
        const uint8_t *stored = this->stored + row * (this->hidden + SCALE_BYTES);
        uint8_t *out = (uint8_t *)this->numbers + row * this->hidden * size;
        float scale;
        uint8_t shape = LINEAR;
        int64_t done = 0;
        memcpy(&scale, stored + this->hidden, SCALE_BYTES);
        if (this->code == INT8) {
            shape = (uint8_t)bits_of(scale);
            scale = float_of(bits_of(scale) & ~0xFFu);
            if (!is_shape(shape)) {
                bad++;
                continue;
            }
        }
        int odd = is_odd(scale);
#if defined(__x86_64__)
        float most = scale * (this->code == INT8 ? (float)(range_of(shape) + ratio_of(shape)) : LARGEST_E4M3);
        int in_range = this->form == FLOAT16 ? most < 65504.0f : !is_odd(most); /* else it is looked at one by one */
        if (in_range && processor_has(AVX2 | F16C)) {
            int32_t kind = shape == LINEAR ? this->code : PIECEWISE;
            done = widenings[kind][this->form](stored, scale, shape, out, this->hidden, &odd);
        }
        if (odd) done = 0;
#endif
        bad += widen_some(this->code, this->form, stored, scale, shape, out, done, this->hidden) | odd;
    }
    if (bad) atomic_fetch_add(&this->bad, bad);
}

static void narrow_part(void *context, int64_t part) {
    conversion *this = context;
    int64_t first = part * rows_of_part(this), last = first + rows_of_part(this), bad = 0;
    if (last > this->rows) last = this->rows;
    for (int64_t row = first; row < last; row++) {
        const float *numbers = (const float *)this->numbers + row * this->hidden;
        uint8_t *out = this->stored + row * (this->hidden + SCALE_BYTES);
        float largest = 0;
        int odd = 0;
        int64_t done = 0;
#if defined(__x86_64__)
        if (processor_has(AVX2 | F16C)) done = largest_vectors(numbers, this->hidden, &largest, &odd);
#endif
        largest = largest_of(numbers, done, this->hidden, largest, &odd);
        uint8_t shape = LINEAR;
        float scale = 0, most = 0;
        if (!odd && this->code == E4M3) {
            scale = scale_of_e4m3(largest);
            most = scale * LARGEST_E4M3;
        } else if (!odd) {
            shape = shape_for(numbers, this->hidden, largest);
            scale = scale_of_int8(shape, largest);
            most = scale * (float)range_of(shape);
        }
        if (odd || is_odd(most)) {
            bad++;
            continue;
        }
        done = 0;
#if defined(__x86_64__)
        if (processor_has(AVX2 | F16C)) done = narrow_vectors(this->code, numbers, scale, shape, out, this->hidden);
#endif
        narrow_some(this->code, numbers, scale, shape, out, done, this->hidden);
        scale = float_of(bits_of(scale) | shape);
        memcpy(out + this->hidden, &scale, SCALE_BYTES);
    }
    if (bad) atomic_fetch_add(&this->bad, bad);
}

static int64_t convert(conversion *this, void (*run)(void *, int64_t), int32_t threads) {
    int64_t nbytes = this->rows * this->hidden;
    pthread_once(&once, prepare);
    if (threads > 1 + nbytes / SHARE) threads = (int32_t)(1 + nbytes / SHARE);
    share(run, this, (this->rows + rows_of_part(this) - 1) / rows_of_part(this), threads);
    return this->bad;
}

/* Make numbers of stored rows; return how many rows have one that is an infinity or a NaN. */
PUBLIC int64_t act_widen(conversion *this, int32_t threads) { return convert(this, widen_part, threads); }

/* Make stored rows of floats; return how many rows hold an infinity or a NaN, of which nothing is made. */
PUBLIC int64_t act_narrow(conversion *this, int32_t threads) {
    pthread_once(&once_for_candidates, prepare_candidates);
    return convert(this, narrow_part, threads);
}

/* --- statistics of rows ------------------------------------------------------------------------------------------------- */

#if defined(__x86_64__)
static double root(double x) { return _mm_cvtsd_f64(_mm_sqrt_sd(_mm_setzero_pd(), _mm_set_sd(x))); }
#elif defined(__aarch64__)
static double root(double x) {
    __asm__("fsqrt %d0, %d1" : "=w"(x) : "w"(x));
    return x;
}
#endif

#define FLUSH 8 /* rows whose sums are made in single precision, before they are added to those in double */

/* Add rows of float32, float16 (kind 1) or bfloat16 (kind 2) to their statistics, by column: sums and sums of squares of
 * what they are beside a pivot, and the largest; and to the sum of the rows' norms. ``scratch`` has room for four rows of
 * float32. Plain loops, which compilers make vectors of. */
#define MOMENTS(name, attributes, convert)                                                                              \
    attributes static void name(const uint8_t *rows, int64_t count, int64_t width, const float *pivot, double *sums,    \
                                double *squares, float *most, double *norms, float *scratch) {                          \
        float *row = scratch, *sum = scratch + width, *square = scratch + 2 * width;                                    \
        for (int64_t first = 0; first < count; first += FLUSH) {                                                        \
            int64_t last = count - first < FLUSH ? count : first + FLUSH;                                               \
            memset(sum, 0, (size_t)(2 * width) * sizeof *sum);                                                          \
            for (int64_t i = first; i < last; i++) {                                                                    \
                const float *values = convert;                                                                          \
                float parts[8] = {0};                                                                                   \
                int64_t c = 0;                                                                                          \
                for (; c + 8 <= width; c += 8)                                                                          \
                    for (int n = 0; n < 8; n++) parts[n] += values[c + n] * values[c + n];                              \
                for (; c < width; c++) parts[0] += values[c] * values[c];                                               \
                double norm = 0;                                                                                        \
                for (int n = 0; n < 8; n++) norm += parts[n];                                                           \
                *norms += root(norm);                                                                                   \
                for (c = 0; c < width; c++) {                                                                           \
                    float beside = values[c] - pivot[c];                                                                \
                    sum[c] += beside;                                                                                   \
                    square[c] += beside * beside;                                                                       \
                    most[c] = values[c] > most[c] ? values[c] : most[c];                                                \
                }                                                                                                       \
            }                                                                                                           \
            for (int64_t c = 0; c < width; c++) sums[c] += sum[c];                                                      \
            for (int64_t c = 0; c < width; c++) squares[c] += square[c];                                                \
        }                                                                                                               \
        (void)row;                                                                                                      \
    }

static const float *from_bfloat16(const uint8_t *rows, int64_t width, float *out) {
    for (int64_t c = 0; c < width; c++) {
        uint16_t half;
        memcpy(&half, rows + 2 * c, 2);
        uint32_t bits = (uint32_t)half << 16;
        memcpy(out + c, &bits, 4);
    }
    return out;
}

#if defined(__x86_64__)
#if defined(__clang__) /* it vectorizes loops without being told, and knows no ``optimize`` */
#define FAST __attribute__((target("avx2,fma,f16c")))
#else
#define FAST __attribute__((target("avx2,fma,f16c"), optimize("O3")))
#endif
#define IN_LINE FAST static inline
IN_LINE const float *from_float16(const uint8_t *rows, int64_t width, float *out) {
    int64_t c = 0;
    for (; c + 8 <= width; c += 8)
        _mm256_storeu_ps(out + c, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(rows + 2 * c))));
    for (; c < width; c++) {
        uint16_t half;
        memcpy(&half, rows + 2 * c, 2);
        out[c] = _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(half)));
    }
    return out;
}
static int is_fast(void) { return processor_has(AVX2 | FMA | F16C); }
#elif defined(__aarch64__)
#define FAST
static const float *from_float16(const uint8_t *rows, int64_t width, float *out) {
    for (int64_t c = 0; c < width; c++) {
        __fp16 half;
        memcpy(&half, rows + 2 * c, 2);
        out[c] = half;
    }
    return out;
}
static int is_fast(void) { return 1; }
#endif

#ifdef FAST
MOMENTS(moments_float32, FAST, (const float *)(const void *)(rows + i * width * 4))
MOMENTS(moments_float16, FAST, from_float16(rows + i * width * 2, width, row))
MOMENTS(moments_bfloat16, FAST, from_bfloat16(rows + i * width * 2, width, row))

PUBLIC int32_t act_moments(const uint8_t *rows, int32_t kind, int64_t count, int64_t width, const float *pivot,
                           double *sums, double *squares, float *most, double *norms, float *scratch) {
    if (!is_fast()) return -1;
    (kind == 0 ? moments_float32 : kind == 1 ? moments_float16 : moments_bfloat16)(rows, count, width, pivot, sums,
                                                                                    squares, most, norms, scratch);
    return 0;
}
#else
PUBLIC int32_t act_moments(const uint8_t *rows, int32_t kind, int64_t count, int64_t width, const float *pivot,
                           double *sums, double *squares, float *most, double *norms, float *scratch) {
    (void)rows, (void)kind, (void)count, (void)width, (void)pivot, (void)sums, (void)squares, (void)most, (void)norms,
        (void)scratch;
    return -1;
}
#endif

/* The sizes of the structures that callers fill, so that one can see that both sides mean the same. */
PUBLIC void act_sizes(int64_t *sizes) {
    const int64_t all[] = {sizeof(table),   sizeof(lookup),     sizeof(column), sizeof(batch), sizeof(reading),
                           sizeof(conversion), sizeof(framing)};
    memcpy(sizes, all, sizeof all);
}
