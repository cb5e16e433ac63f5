/* Packs weights into NVFP4, FP8 and INT8 and unpacks them: builder/formats/kernels/packing.py says what each function does.
 *
 * The loops are in loops.h, which is compiled once for each instruction set. All arithmetic is IEEE float32 in the order
 * of builder/formats/arithmetic, and must be compiled with -ffp-contract=off: one fused multiply-add would change bytes.
 */
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000 /* 3.11: the first with the buffer protocol */
#include <Python.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__ || !defined(__GNUC__)
#error "safetensors are little-endian, and the loops are written for GCC and Clang"
#endif

#define INLINE static inline __attribute__((always_inline))

/* Weights in a file may begin at any byte. */
typedef uint16_t __attribute__((aligned(1), may_alias)) Half;
typedef uint32_t __attribute__((aligned(1), may_alias)) Word;

/* The types of numbers, as native.py numbers them. */
enum { BF16, F16, F32 };

static inline size_t size_of(int type) { return type == F32 ? 4 : 2; }

typedef struct {
    const char *name;
    void (*largest_rows)(const void *, int, int, size_t, size_t, float *);
    void (*pack_nvfp4)(const void *, int, int, size_t, float, int, uint8_t *, uint8_t *);
    void (*pack_fp8)(const void *, int, int, size_t, size_t, const float *, size_t, uint8_t *);
    void (*pack_int8)(const void *, int, int, size_t, size_t, const float *, uint8_t, uint8_t *);
    void (*unpack_nvfp4)(const uint8_t *, const uint8_t *, float, size_t, int, void *);
    void (*unpack_fp8)(const uint8_t *, size_t, size_t, const float *, size_t, int, void *);
} Path;

#define PATH(suffix) \
    {#suffix,            largest_rows_##suffix, pack_nvfp4_##suffix, \
     pack_fp8_##suffix,  pack_int8_##suffix,    unpack_nvfp4_##suffix, \
     unpack_fp8_##suffix}

#if defined(__x86_64__)
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")))
#define NAME(name) name##_avx512
#include "loops.h"
#undef TARGET
#undef NAME
#define TARGET __attribute__((target("avx2")))
#define NAME(name) name##_avx2
#include "loops.h"
#undef TARGET
#undef NAME
#endif
#define TARGET
#define NAME(name) name##_baseline /* SSE2 on x86-64, NEON on ARM */
#include "loops.h"

/* The fastest first. */
static const Path PATHS[] = {
#if defined(__x86_64__)
    PATH(avx512),
    PATH(avx2),
#endif
    PATH(baseline),
};
enum { COUNT = sizeof PATHS / sizeof *PATHS };

static int runs_here(const Path *path) {
#if defined(__x86_64__)
    if (strcmp(path->name, "avx512") == 0)
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (strcmp(path->name, "avx2") == 0)
        return __builtin_cpu_supports("avx2");
#endif
    return path != NULL;
}

static const Path *path_of(const char *name) {
    for (int i = 0; i < COUNT; i++)
        if (strcmp(PATHS[i].name, name) == 0 && runs_here(&PATHS[i]))
            return &PATHS[i];
    PyErr_Format(PyExc_ValueError, "this CPU has no path %s", name);
    return NULL;
}

static PyObject *done(int fits, Py_buffer **buffers) {
    for (; *buffers; buffers++)
        PyBuffer_Release(*buffers);
    if (fits)
        Py_RETURN_NONE;
    if (!PyErr_Occurred())
        PyErr_SetString(PyExc_ValueError, "the sizes of the buffers do not match");
    return NULL;
}

static PyObject *py_paths(PyObject *self, PyObject *args) {
    PyObject *names = PyList_New(0);
    for (int i = 0; names && i < COUNT; i++) {
        if (!runs_here(&PATHS[i]))
            continue;
        PyObject *name = PyUnicode_FromString(PATHS[i].name);
        if (!name || PyList_Append(names, name) < 0)
            Py_CLEAR(names);
        Py_XDECREF(name);
    }
    return names;
}

/* (path, values, type, rounded to, rows, largest float32 [rows]) */
static PyObject *py_largest_rows(PyObject *self, PyObject *args) {
    const char *name;
    Py_buffer values, out;
    int type, rounded;
    Py_ssize_t rows;
    if (!PyArg_ParseTuple(args, "sy*iinw*", &name, &values, &type, &rounded, &rows, &out))
        return NULL;
    const Path *path = path_of(name);
    size_t count = values.len / size_of(type);
    int fits = path && rows > 0 && count % rows == 0 && (size_t)out.len == rows * sizeof(float);
    if (fits) {
        Py_BEGIN_ALLOW_THREADS
        path->largest_rows(values.buf, type, rounded, rows, count / rows, out.buf);
        Py_END_ALLOW_THREADS
    }
    return done(fits, (Py_buffer *[]){&values, &out, NULL});
}

/* (path, values, type, rounded to, global scale, whether scales are searched, codes, block scales) */
static PyObject *py_pack_nvfp4(PyObject *self, PyObject *args) {
    const char *name;
    Py_buffer values, codes, scales;
    int type, rounded, searched;
    float scale;
    if (!PyArg_ParseTuple(args, "sy*iifpw*w*", &name, &values, &type, &rounded, &scale, &searched, &codes, &scales))
        return NULL;
    const Path *path = path_of(name);
    size_t blocks = scales.len;
    int fits = path && (size_t)values.len == blocks * 16 * size_of(type) && (size_t)codes.len == blocks * 8;
    if (fits) {
        Py_BEGIN_ALLOW_THREADS
        path->pack_nvfp4(values.buf, type, rounded, blocks, scale, searched, codes.buf, scales.buf);
        Py_END_ALLOW_THREADS
    }
    return done(fits, (Py_buffer *[]){&values, &codes, &scales, NULL});
}

/* (path, values, type, rounded to, rows, scales float32 [rows] or [1], codes) */
static PyObject *py_pack_fp8(PyObject *self, PyObject *args) {
    const char *name;
    Py_buffer values, scales, codes;
    int type, rounded;
    Py_ssize_t rows;
    if (!PyArg_ParseTuple(args, "sy*iiny*w*", &name, &values, &type, &rounded, &rows, &scales, &codes))
        return NULL;
    const Path *path = path_of(name);
    size_t count = codes.len, each = scales.len / sizeof(float);
    int fits = path && rows > 0 && count % rows == 0 && (size_t)values.len == count * size_of(type) &&
               (each == 1 || each == (size_t)rows);
    if (fits) {
        Py_BEGIN_ALLOW_THREADS
        path->pack_fp8(values.buf, type, rounded, rows, count / rows, scales.buf, each > 1, codes.buf);
        Py_END_ALLOW_THREADS
    }
    return done(fits, (Py_buffer *[]){&values, &scales, &codes, NULL});
}

/* (path, values, type, rounded to, rows, scales float32 [rows], sign: what each code's bits are combined with, codes) */
static PyObject *py_pack_int8(PyObject *self, PyObject *args) {
    const char *name;
    Py_buffer values, scales, codes;
    int type, rounded;
    unsigned char sign;
    Py_ssize_t rows;
    if (!PyArg_ParseTuple(args, "sy*iiny*bw*", &name, &values, &type, &rounded, &rows, &scales, &sign, &codes))
        return NULL;
    const Path *path = path_of(name);
    size_t count = codes.len;
    int fits = path && rows > 0 && count % rows == 0 && (size_t)values.len == count * size_of(type) &&
               (size_t)scales.len == rows * sizeof(float);
    if (fits) {
        Py_BEGIN_ALLOW_THREADS
        path->pack_int8(values.buf, type, rounded, rows, count / rows, scales.buf, sign, codes.buf);
        Py_END_ALLOW_THREADS
    }
    return done(fits, (Py_buffer *[]){&values, &scales, &codes, NULL});
}

/* (path, codes, block scales, global scale, type, values) */
static PyObject *py_unpack_nvfp4(PyObject *self, PyObject *args) {
    const char *name;
    Py_buffer codes, scales, values;
    float scale;
    int type;
    if (!PyArg_ParseTuple(args, "sy*y*fiw*", &name, &codes, &scales, &scale, &type, &values))
        return NULL;
    const Path *path = path_of(name);
    size_t blocks = scales.len;
    int fits = path && (size_t)values.len == blocks * 16 * size_of(type) && (size_t)codes.len == blocks * 8;
    if (fits) {
        Py_BEGIN_ALLOW_THREADS
        path->unpack_nvfp4(codes.buf, scales.buf, scale, blocks, type, values.buf);
        Py_END_ALLOW_THREADS
    }
    return done(fits, (Py_buffer *[]){&codes, &scales, &values, NULL});
}

/* (path, codes, rows, scales float32 [rows] or [1], type, values) */
static PyObject *py_unpack_fp8(PyObject *self, PyObject *args) {
    const char *name;
    Py_buffer codes, scales, values;
    int type;
    Py_ssize_t rows;
    if (!PyArg_ParseTuple(args, "sy*ny*iw*", &name, &codes, &rows, &scales, &type, &values))
        return NULL;
    const Path *path = path_of(name);
    size_t count = codes.len, each = scales.len / sizeof(float);
    int fits = path && rows > 0 && count % rows == 0 && (size_t)values.len == count * size_of(type) &&
               (each == 1 || each == (size_t)rows);
    if (fits) {
        Py_BEGIN_ALLOW_THREADS
        path->unpack_fp8(codes.buf, rows, count / rows, scales.buf, each > 1, type, values.buf);
        Py_END_ALLOW_THREADS
    }
    return done(fits, (Py_buffer *[]){&codes, &scales, &values, NULL});
}

static PyMethodDef METHODS[] = {
    {"paths", py_paths, METH_NOARGS, "The instruction sets that this CPU runs, the fastest first."},
    {"largest_rows", py_largest_rows, METH_VARARGS, NULL},
    {"pack_nvfp4", py_pack_nvfp4, METH_VARARGS, NULL},
    {"pack_fp8", py_pack_fp8, METH_VARARGS, NULL},
    {"pack_int8", py_pack_int8, METH_VARARGS, NULL},
    {"unpack_nvfp4", py_unpack_nvfp4, METH_VARARGS, NULL},
    {"unpack_fp8", py_unpack_fp8, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static int fill(PyObject *module) { return PyModule_AddStringConstant(module, "SOURCE", SOURCE); }

static PyModuleDef_Slot SLOTS[] = {{Py_mod_exec, fill}, {0, NULL}};
static struct PyModuleDef MODULE = {PyModuleDef_HEAD_INIT, "_native", NULL, 0, METHODS, SLOTS, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__native(void) { return PyModuleDef_Init(&MODULE); }
