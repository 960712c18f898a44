/* py_dlpack.c - tensors of any library enter through DLPack 1.x, without a copy.
 *
 * Every object can be asked by its method __dlpack__; the capsule that it returns is kept unconsumed: it owns the
 * export, and dropping it releases it. A type may also offer a table of C functions (the DLPack C exchange API), which
 * is many times faster, and owns the same. Whatever that way cannot say or does not refuse as __dlpack__ would is
 * left to __dlpack__: gradients, complex numbers, streams that the caller names, and all errors. */
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

typedef struct dl_version {
    uint32_t major, minor;
} dl_version;

struct dl_managed_tensor_versioned {
    dl_version version;
    void *context;
    void (*deleter)(dl_managed_tensor_versioned *);
    uint64_t flags;
    dl_tensor tensor;
};

/* Exported under the name __dlpack_c_exchange_api__ of a type, as a capsule; lives as long as the process. */
struct dl_exchange_api {
    dl_version version;
    const dl_exchange_api *previous; /* an older one, or NULL */
    void (*managed_tensor_allocator)(void);
    int (*managed_tensor_from_object)(void *object, dl_managed_tensor_versioned **out); /* 0, or -1: Python error set */
    void (*managed_tensor_to_object)(void);
    /* Without an owner: for as long as the object lives and nobody changes it. May be NULL. */
    int (*tensor_from_object)(void *object, dl_tensor *out);
    int (*current_work_stream)(int32_t device_type, int32_t device_id, void **out);
};

#define DL_FLAG_READ_ONLY ((uint64_t)1)
#define DL_FLAG_IS_COPIED ((uint64_t)2)

/* "keys of layer 3" or "mass". */
static PyObject *argument_name(const char *name, Py_ssize_t index)
{
    return index < 0 ? PyUnicode_FromString(name) : PyUnicode_FromFormat("%s of layer %zd", name, index);
}

/* Sets the exception and returns -1. */
static int refuse(PyObject *exception, const char *name, Py_ssize_t index, const char *format, ...)
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
    return -1;
}

/* Turns the exception a producer raised (BufferError and such) into ours, keeping its text. */
static void refuse_export(module_state *state, const char *name, Py_ssize_t index)
{
    PyObject *type = NULL, *value = NULL, *traceback = NULL;
    if (PyErr_ExceptionMatches(PyExc_MemoryError) || !PyErr_ExceptionMatches(PyExc_Exception))
        return;
    PyErr_Fetch(&type, &value, &traceback);
    PyErr_NormalizeException(&type, &value, &traceback);
    refuse(state->invalid_argument_error, name, index, "cannot be exported through DLPack: %S", value);
    Py_XDECREF(type);
    Py_XDECREF(value);
    Py_XDECREF(traceback);
}

/* The arguments of __dlpack__ for work on a stream: new, or NULL with an exception set. */
static PyObject *stream_keywords(module_state *state, PyObject *object, PyObject *stream)
{
    PyObject *device = PyObject_CallMethod(object, "__dlpack_device__", NULL);
    PyObject *type = device != NULL ? PySequence_GetItem(device, 0) : NULL;
    PyObject *keywords = type != NULL ? PyDict_Copy(state->dlpack_keywords) : NULL;
    long number = type != NULL ? PyLong_AsLong(type) : -1;
    if (keywords != NULL && ((number == -1 && PyErr_Occurred()) ||
                             (number == DL_CUDA && PyDict_SetItemString(keywords, "stream", stream) < 0)))
        Py_CLEAR(keywords);
    Py_XDECREF(device);
    Py_XDECREF(type);
    return keywords;
}

static PyObject *call_dlpack(module_state *state, PyObject *object, PyObject *stream, const char *name,
                             Py_ssize_t index)
{
    PyObject *method = PyObject_GetAttrString(object, "__dlpack__");
    if (method == NULL) {
        if (!PyErr_ExceptionMatches(PyExc_AttributeError))
            return NULL;
        PyErr_Clear();
        refuse(PyExc_TypeError, name, index,
               "an object of type %S has no __dlpack__; pass a NumPy array, a torch tensor or alike",
               (PyObject *)Py_TYPE(object));
        return NULL;
    }
    PyObject *keywords = stream != NULL ? stream_keywords(state, object, stream) : Py_NewRef(state->dlpack_keywords);
    PyObject *capsule = keywords != NULL ? PyObject_Call(method, state->empty_tuple, keywords) : NULL;
    Py_XDECREF(keywords);
    if (capsule == NULL && stream == NULL && PyErr_ExceptionMatches(PyExc_TypeError)) { /* older than DLPack 1.0 */
        PyErr_Clear();
        capsule = PyObject_CallNoArgs(method);
    }
    Py_DECREF(method);
    if (capsule == NULL)
        refuse_export(state, name, index);
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

/* Looks up the table that the object's type itself offers. That of a base class is not for a subclass, whose __dlpack__
 * may be another. The answer for the latest type is remembered, since a list mostly holds one. */
static int find_exchange(module_state *state, borrowed_list *list, PyObject *object)
{
    PyObject *type = (PyObject *)Py_TYPE(object);
    if (list->exchange_type == type)
        return 0;
    Py_XDECREF(list->exchange_type);
    list->exchange_type = Py_NewRef(type);
    list->exchange = NULL;
    PyObject *members = PyObject_GetAttr(type, state->dict_name);
    PyObject *capsule = members != NULL ? PyObject_GetItem(members, state->exchange_name) : NULL;
    Py_XDECREF(members);
    if (capsule == NULL) {
        if (!PyErr_ExceptionMatches(PyExc_KeyError))
            return -1;
        PyErr_Clear();
        return 0;
    }
    const dl_exchange_api *exchange = NULL;
    if (PyCapsule_IsValid(capsule, "dlpack_exchange_api"))
        exchange = PyCapsule_GetPointer(capsule, "dlpack_exchange_api");
    Py_DECREF(capsule);
    while (exchange != NULL && exchange->version.major > 1)
        exchange = exchange->previous;
    if (exchange == NULL || exchange->version.major != 1)
        return 0;
    /* PyTorch's function exports a tensor that requires grad, which its __dlpack__ refuses. */
    PyObject *requires_grad = PyObject_GetAttr(type, state->requires_grad_name);
    if (requires_grad == NULL && !PyErr_ExceptionMatches(PyExc_AttributeError))
        return -1;
    PyErr_Clear();
    list->exchange_has_gradients = requires_grad != NULL;
    Py_XDECREF(requires_grad);
    list->exchange = exchange;
    return 0;
}

static void release_managed(dl_managed_tensor_versioned *managed)
{
    if (managed != NULL && managed->deleter != NULL)
        managed->deleter(managed);
}

/* Whether the object may be asked through list->exchange. -1: a Python error is set. */
static int may_exchange(module_state *state, borrowed_list *list, PyObject *object)
{
    if (find_exchange(state, list, object) < 0)
        return -1;
    if (list->exchange == NULL || !list->exchange_has_gradients)
        return list->exchange != NULL;
    PyObject *requires_grad = PyObject_GetAttr(object, state->requires_grad_name);
    int no_gradient = requires_grad == Py_False;
    Py_XDECREF(requires_grad);
    return requires_grad == NULL ? -1 : no_gradient;
}

/* After a failure of the exchange: 0 where __dlpack__ is to be asked, -1 where the Python error is to be told. */
static int forgive_exchange(void)
{
    if (PyErr_ExceptionMatches(PyExc_MemoryError) || !PyErr_ExceptionMatches(PyExc_Exception))
        return -1;
    PyErr_Clear();
    return 0;
}

static int is_for_exchange(const borrowed_list *list, const dl_tensor *tensor)
{
    btx_dtype dtype;
    const int32_t device = tensor->device.type;
    return read_dtype(tensor, &dtype) && (device == DL_CPU || (device == DL_CUDA && list->stream == NULL));
}

/* Exports through the C exchange API. *out stays NULL where __dlpack__ is to be asked. -1: a Python error is set. */
static int exchange_tensor(module_state *state, borrowed_list *list, PyObject *object,
                           dl_managed_tensor_versioned **out)
{
    int may = may_exchange(state, list, object);
    if (may <= 0)
        return may;
    if (list->exchange->managed_tensor_from_object(object, out) != 0) {
        *out = NULL;
        return forgive_exchange();
    }
    if ((*out)->version.major != 1 || !is_for_exchange(list, &(*out)->tensor)) {
        release_managed(*out);
        *out = NULL;
    }
    return 0;
}

/* What DLPack says of a tensor, checked. */
static int fill_view(module_state *state, btx_tensor *view, const dl_tensor *tensor, int read_only, const char *name,
                     Py_ssize_t index)
{
    if (tensor->ndim < 0 || tensor->ndim > BTX_MAX_DIMS)
        return refuse(state->invalid_argument_error, name, index, "has %d dimensions; at most %d are used",
                      (int)tensor->ndim, BTX_MAX_DIMS);
    *view = (btx_tensor){.num_dims = tensor->ndim, .read_only = read_only};
    if (!read_dtype(tensor, &view->dtype))
        return refuse(state->invalid_argument_error, name, index,
                      "its dtype (DLPack code %d, %d bits) is none of float32, float16, bfloat16, int32, int64",
                      (int)tensor->dtype.code, (int)tensor->dtype.bits);
    if (tensor->device.type == DL_CUDA)
        view->device = (btx_device){BTX_CUDA, tensor->device.id};
    else if (tensor->device.type != DL_CPU && tensor->device.type != DL_CUDA_HOST)
        return refuse(state->unsupported_error, name, index, "is on DLPack device type %d; CPU and CUDA are supported",
                      (int)tensor->device.type);
    uint64_t stride = 1; /* of an empty tensor it may wrap around */
    for (int32_t d = tensor->ndim - 1; d >= 0; d--) {
        view->shape[d] = tensor->shape[d];
        view->stride[d] = tensor->strides != NULL ? tensor->strides[d] : (int64_t)stride;
        stride *= (uint64_t)tensor->shape[d];
    }
    view->data = tensor->data == NULL ? NULL : (char *)tensor->data + tensor->byte_offset;
    if (view->data != NULL && (uintptr_t)view->data % btx_dtype_size(view->dtype) != 0)
        return refuse(state->invalid_argument_error, name, index,
                      "its data are not aligned to %zu bytes; copy the tensor", btx_dtype_size(view->dtype));
    return 0;
}

int borrow_tensor(module_state *state, borrowed_list *list, Py_ssize_t i, PyObject *object, const char *name,
                  Py_ssize_t index)
{
    btx_tensor *view = &list->views[i];
    const dl_managed_tensor_versioned *managed = NULL;
    const dl_tensor *tensor = NULL;
    if (exchange_tensor(state, list, object, &list->exports[i]) < 0)
        return -1;
    managed = list->exports[i];
    if (managed == NULL) {
        PyObject *capsule = list->capsules[i] = call_dlpack(state, object, list->stream, name, index);
        if (capsule == NULL)
            return -1;
        if (PyCapsule_IsValid(capsule, "dltensor_versioned")) {
            managed = PyCapsule_GetPointer(capsule, "dltensor_versioned");
        }
        else if (PyCapsule_IsValid(capsule, "dltensor")) {
            tensor = &((const dl_managed_tensor *)PyCapsule_GetPointer(capsule, "dltensor"))->tensor;
        }
        else {
            return refuse(PyExc_TypeError, name, index, "__dlpack__ of %S returned no DLPack capsule",
                          (PyObject *)Py_TYPE(object));
        }
    }
    int read_only = 0;
    if (managed != NULL) {
        if (managed->version.major != 1)
            return refuse(state->unsupported_error, name, index, "exported with DLPack %u; version 1 is understood",
                          (unsigned)managed->version.major);
        if ((managed->flags & DL_FLAG_IS_COPIED) != 0)
            return refuse(
                state->invalid_argument_error, name, index,
                "its library exported a copy, in which writes are lost; pass a tensor that shares its memory");
        tensor = &managed->tensor;
        read_only = (managed->flags & DL_FLAG_READ_ONLY) != 0;
    }
    return fill_view(state, view, tensor, read_only, name, index);
}

int look_at_tensor(module_state *state, borrowed_list *list, Py_ssize_t i, PyObject *object, int read_only,
                   const char *name, Py_ssize_t index)
{
    dl_tensor tensor;
    int may = may_exchange(state, list, object);
    if (may < 0)
        return -1;
    if (may && list->exchange->tensor_from_object != NULL) {
        if (list->exchange->tensor_from_object(object, &tensor) != 0) {
            if (forgive_exchange() < 0)
                return -1;
        }
        else if (is_for_exchange(list, &tensor)) {
            return fill_view(state, &list->views[i], &tensor, read_only, name, index);
        }
    }
    return borrow_tensor(state, list, i, object, name, index);
}

void *current_stream(module_state *state, borrowed_list *list, PyObject *object)
{
    void *stream = NULL;
    if (list->views[0].device.type != BTX_CUDA)
        return NULL;
    if (find_exchange(state, list, object) < 0 || list->exchange == NULL ||
        list->exchange->current_work_stream(DL_CUDA, list->views[0].device.index, &stream) != 0) {
        PyErr_Clear();
        return NULL;
    }
    return stream;
}

int borrowed_list_init(borrowed_list *list, Py_ssize_t length, PyObject *stream)
{
    *list = (borrowed_list){.length = length, .stream = stream};
    list->capsules = PyMem_Calloc((size_t)length + 1, sizeof *list->capsules);
    list->exports = PyMem_Calloc((size_t)length + 1, sizeof *list->exports);
    list->views = PyMem_Calloc((size_t)length + 1, sizeof *list->views);
    if (list->capsules != NULL && list->exports != NULL && list->views != NULL)
        return 0;
    borrowed_list_clear(list);
    PyErr_NoMemory();
    return -1;
}

void borrowed_list_clear(borrowed_list *list)
{
    PyObject *type, *value, *traceback; /* a deleter may run Python, in which none may be pending */
    PyErr_Fetch(&type, &value, &traceback);
    for (Py_ssize_t i = 0; i < list->length; i++) {
        if (list->capsules != NULL)
            Py_XDECREF(list->capsules[i]);
        if (list->exports != NULL)
            release_managed(list->exports[i]);
    }
    Py_XDECREF(list->exchange_type);
    PyMem_Free(list->capsules);
    PyMem_Free(list->exports);
    PyMem_Free(list->views);
    *list = (borrowed_list){0};
    PyErr_Restore(type, value, traceback);
}
