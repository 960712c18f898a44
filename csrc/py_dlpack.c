/* py_dlpack.c - tensors of any library enter through DLPack 1.x, without a copy.
 *
 * The capsule that __dlpack__ returns is kept unconsumed: it owns the export, and dropping it releases it. */
#include "py_module.h"

/* The part of the DLPack ABI that is read here (https://dmlc.github.io/dlpack/latest/c_api.html). */
typedef struct dl_device {
    int32_t type;
    int32_t id;
} dl_device;

enum { DL_CPU = 1, DL_CUDA = 2, DL_CUDA_HOST = 3 };
enum { DL_INT = 0, DL_FLOAT = 2, DL_BFLOAT = 4 };

typedef struct dl_tensor {
    void *data;
    dl_device device;
    int32_t ndim;
    struct {
        uint8_t code;
        uint8_t bits;
        uint16_t lanes;
    } dtype;
    int64_t *shape;
    int64_t *strides; /* NULL: row-major */
    uint64_t byte_offset;
} dl_tensor;

typedef struct dl_managed_tensor {
    dl_tensor tensor;
    void *context;
    void (*deleter)(struct dl_managed_tensor *);
} dl_managed_tensor;

typedef struct dl_managed_tensor_versioned {
    struct {
        uint32_t major, minor;
    } version;
    void *context;
    void (*deleter)(struct dl_managed_tensor_versioned *);
    uint64_t flags;
    dl_tensor tensor;
} dl_managed_tensor_versioned;

#define DL_FLAG_READ_ONLY ((uint64_t)1)
#define DL_FLAG_IS_COPIED ((uint64_t)2)

/* "keys of layer 3" or "mass". */
static PyObject *argument_name(const char *name, Py_ssize_t index)
{
    return index < 0 ? PyUnicode_FromString(name) : PyUnicode_FromFormat("%s of layer %zd", name, index);
}

static PyObject *refuse(PyObject *exception, const char *name, Py_ssize_t index, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    PyObject *what = argument_name(name, index);
    PyObject *why = PyUnicode_FromFormatV(format, arguments);
    va_end(arguments);
    if (what != NULL && why != NULL)
        PyErr_Format(exception, "%U: %U", what, why);
    Py_XDECREF(what);
    Py_XDECREF(why);
    return NULL;
}

/* Turns the exception a producer raised (BufferError and such) into ours, keeping its text. */
static PyObject *refuse_export(module_state *state, const char *name, Py_ssize_t index)
{
    PyObject *type = NULL, *value = NULL, *traceback = NULL;
    if (PyErr_ExceptionMatches(PyExc_MemoryError) || !PyErr_ExceptionMatches(PyExc_Exception))
        return NULL;
    PyErr_Fetch(&type, &value, &traceback);
    PyErr_NormalizeException(&type, &value, &traceback);
    refuse(state->invalid_argument_error, name, index, "cannot be exported through DLPack: %S", value);
    Py_XDECREF(type);
    Py_XDECREF(value);
    Py_XDECREF(traceback);
    return NULL;
}

static PyObject *call_dlpack(module_state *state, PyObject *object, const char *name, Py_ssize_t index)
{
    PyObject *method = PyObject_GetAttrString(object, "__dlpack__");
    if (method == NULL) {
        if (!PyErr_ExceptionMatches(PyExc_AttributeError))
            return NULL;
        PyErr_Clear();
        return refuse(PyExc_TypeError, name, index,
                      "an object of type %S has no __dlpack__; pass a NumPy array, a torch tensor or alike",
                      (PyObject *)Py_TYPE(object));
    }
    PyObject *capsule = PyObject_Call(method, state->empty_tuple, state->dlpack_keywords);
    if (capsule == NULL && PyErr_ExceptionMatches(PyExc_TypeError)) { /* a producer older than DLPack 1.0 */
        PyErr_Clear();
        capsule = PyObject_CallNoArgs(method);
    }
    Py_DECREF(method);
    if (capsule == NULL)
        return refuse_export(state, name, index);
    return capsule;
}

static int read_dtype(const dl_tensor *tensor, btx_dtype *dtype)
{
    int code = tensor->dtype.code, bits = tensor->dtype.bits;
    if (tensor->dtype.lanes != 1)
        return 0;
    if (code == DL_FLOAT && bits == 32)
        *dtype = BTX_F32;
    else if (code == DL_FLOAT && bits == 16)
        *dtype = BTX_F16;
    else if (code == DL_BFLOAT && bits == 16)
        *dtype = BTX_BF16;
    else if (code == DL_INT && bits == 32)
        *dtype = BTX_I32;
    else if (code == DL_INT && bits == 64)
        *dtype = BTX_I64;
    else
        return 0;
    return 1;
}

PyObject *borrow_tensor(module_state *state, PyObject *object, const char *name, Py_ssize_t index, btx_tensor *view)
{
    PyObject *capsule = call_dlpack(state, object, name, index);
    const dl_tensor *tensor = NULL;
    int read_only = 0;
    if (capsule == NULL)
        return NULL;
    if (PyCapsule_IsValid(capsule, "dltensor_versioned")) {
        const dl_managed_tensor_versioned *managed = PyCapsule_GetPointer(capsule, "dltensor_versioned");
        if (managed->version.major != 1) {
            refuse(state->unsupported_error, name, index, "exported with DLPack %u; version 1 is understood",
                   (unsigned)managed->version.major);
            goto fail;
        }
        tensor = &managed->tensor;
        read_only = (managed->flags & DL_FLAG_READ_ONLY) != 0;
        if ((managed->flags & DL_FLAG_IS_COPIED) != 0) {
            refuse(state->invalid_argument_error, name, index,
                   "its library exported a copy, in which writes are lost; pass a tensor that shares its memory");
            goto fail;
        }
    }
    else if (PyCapsule_IsValid(capsule, "dltensor")) {
        tensor = &((const dl_managed_tensor *)PyCapsule_GetPointer(capsule, "dltensor"))->tensor;
    }
    else {
        refuse(PyExc_TypeError, name, index, "__dlpack__ of %S returned no DLPack capsule",
               (PyObject *)Py_TYPE(object));
        goto fail;
    }

    if (tensor->ndim < 0 || tensor->ndim > BTX_MAX_DIMS) {
        refuse(state->invalid_argument_error, name, index, "has %d dimensions; at most %d are used", (int)tensor->ndim,
               BTX_MAX_DIMS);
        goto fail;
    }
    *view = (btx_tensor){.num_dims = tensor->ndim, .read_only = read_only};
    if (!read_dtype(tensor, &view->dtype)) {
        refuse(state->invalid_argument_error, name, index,
               "its dtype (DLPack code %d, %d bits) is none of float32, float16, bfloat16, int32, int64",
               (int)tensor->dtype.code, (int)tensor->dtype.bits);
        goto fail;
    }
    if (tensor->device.type == DL_CUDA)
        view->device = (btx_device){BTX_CUDA, tensor->device.id};
    else if (tensor->device.type != DL_CPU && tensor->device.type != DL_CUDA_HOST) {
        refuse(state->unsupported_error, name, index, "is on DLPack device type %d; CPU and CUDA are supported",
               (int)tensor->device.type);
        goto fail;
    }
    int64_t stride = 1;
    for (int32_t d = tensor->ndim - 1; d >= 0; d--) {
        view->shape[d] = tensor->shape[d];
        view->stride[d] = tensor->strides != NULL ? tensor->strides[d] : stride;
        if (tensor->strides == NULL)
            stride *= tensor->shape[d];
    }
    view->data = tensor->data == NULL ? NULL : (char *)tensor->data + tensor->byte_offset;
    if (view->data != NULL && (uintptr_t)view->data % btx_dtype_size(view->dtype) != 0) {
        refuse(state->invalid_argument_error, name, index, "its data are not aligned to %zu bytes; copy the tensor",
               btx_dtype_size(view->dtype));
        goto fail;
    }
    return capsule;

fail:
    Py_DECREF(capsule);
    return NULL;
}

int borrowed_list_init(borrowed_list *list, Py_ssize_t length)
{
    list->length = length;
    list->capsules = PyMem_Calloc((size_t)length + 1, sizeof *list->capsules);
    list->views = PyMem_Calloc((size_t)length + 1, sizeof *list->views);
    if (list->capsules != NULL && list->views != NULL)
        return 0;
    borrowed_list_clear(list);
    PyErr_NoMemory();
    return -1;
}

void borrowed_list_clear(borrowed_list *list)
{
    for (Py_ssize_t i = 0; list->capsules != NULL && i < list->length; i++)
        Py_XDECREF(list->capsules[i]);
    PyMem_Free(list->capsules);
    PyMem_Free(list->views);
    *list = (borrowed_list){0};
}
