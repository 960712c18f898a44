/* py_module.c - the module bottleneck_ext._core: its state, exceptions and functions. */
#include <stdlib.h>
#include <string.h>

#include "py_module.h"
#ifdef BTX_WITH_CUDA
#include "../kernels/cuda/cuda.h"
#endif

module_state *module_state_of(PyObject *module)
{
    return PyModule_GetState(module);
}

module_state *module_state_of_self(PyTypeObject *type)
{
    return PyType_GetModuleState(type); /* our types cannot be subclassed */
}

PyObject *raise_status(module_state *state, btx_status status, const btx_error *error)
{
    PyObject *exception = state->bottleneck_error;
    switch (status) {
    case BTX_OK:
        break;
    case BTX_INVALID_ARGUMENT:
        exception = state->invalid_argument_error;
        break;
    case BTX_UNSUPPORTED:
        exception = state->unsupported_error;
        break;
    case BTX_OUT_OF_MEMORY:
        exception = PyExc_MemoryError;
        break;
    case BTX_DEVICE_ERROR:
        exception = state->device_error;
        break;
    case BTX_REBUILD_NEEDED:
        exception = state->rebuild_needed_error;
        break;
    }
    /* The sentence may end within a character of a name it quotes. */
    PyObject *message = PyUnicode_DecodeUTF8(error->message, (Py_ssize_t)strlen(error->message), "replace");
    if (message != NULL)
        PyErr_SetObject(exception, message);
    Py_XDECREF(message);
    return NULL;
}

const btx_backend *find_backend(module_state *state, const char *name, int32_t *device_index)
{
    const btx_backend *backend = NULL;
    btx_error error = {{0}};
    char forced[64];
    const char *isa = getenv("BOTTLENECKED_CPU_ISA");
    if (strcmp(name, "cpu") == 0 && isa != NULL && isa[0] != '\0') {
        PyOS_snprintf(forced, sizeof forced, "cpu:%s", isa);
        name = forced;
    }
    btx_status status = btx_backend_find(name, &backend, device_index, &error);
    if (status != BTX_OK)
        raise_status(state, status, &error);
    return backend;
}

static PyObject *module_backends(PyObject *module, PyObject *unused)
{
    (void)module, (void)unused;
    int32_t count = 0;
    const btx_backend *const *backends = btx_backends(&count);
    PyObject *list = PyList_New(0);
    for (int32_t i = 0; list != NULL && i < count; i++) {
        const btx_backend *backend = backends[i];
        PyObject *entry = Py_BuildValue(
            "{s:N,s:s,s:s,s:s,s:O}", "name",
            PyUnicode_FromFormat("%s%s%s", backend->name, backend->variant[0] ? ":" : "", backend->variant), "backend",
            backend->name, "variant", backend->variant, "device", btx_device_type_name(backend->device_type),
            "available", backend->available() ? Py_True : Py_False);
        if (entry == NULL || PyList_Append(list, entry) < 0)
            Py_CLEAR(list);
        Py_XDECREF(entry);
    }
    return list;
}

static PyObject *module_default_backend(PyObject *module, PyObject *unused)
{
    (void)unused;
    int32_t device_index;
    const btx_backend *backend = find_backend(module_state_of(module), "cpu", &device_index);
    return backend == NULL ? NULL : PyUnicode_FromFormat("%s:%s", backend->name, backend->variant);
}

/* A string, or None for an empty one. */
static PyObject *text_or_none(const char *text)
{
    return text[0] != '\0' ? PyUnicode_FromString(text) : Py_NewRef(Py_None);
}

/* ["80", "90a"] from "80,90a". */
static PyObject *split_list(const char *text)
{
    PyObject *whole = PyUnicode_FromString(text), *comma = PyUnicode_FromString(",");
    PyObject *list = whole != NULL && comma != NULL ? PyUnicode_Split(whole, text[0] != '\0' ? comma : NULL, -1) : NULL;
    Py_XDECREF(whole);
    Py_XDECREF(comma);
    return list;
}

static PyObject *describe_cuda(void)
{
#ifdef BTX_WITH_CUDA
    btx_cuda_info info;
    PyObject *compiled = Py_True;
    btx_cuda_describe(&info);
#else
    const struct {
        const char *architectures, *device, *driver, *cublaslt;
        int available;
    } info = {"", "", "", "", 0};
    PyObject *compiled = Py_False;
#endif
    return Py_BuildValue("{s:O,s:N,s:O,s:N,s:N,s:N}", "compiled", compiled, "architectures",
                         split_list(info.architectures), "available", info.available ? Py_True : Py_False, "device",
                         text_or_none(info.device), "driver", text_or_none(info.driver), "cublaslt",
                         text_or_none(info.cublaslt));
}

static PyObject *module_build_info(PyObject *module, PyObject *unused)
{
    (void)module, (void)unused;
    return Py_BuildValue("{s:s,s:I,s:s,s:N}", "version", BTX_VERSION, "abi_version", BTX_ABI_VERSION, "compiler",
#if defined(__clang__)
                         "clang " __clang_version__,
#elif defined(__GNUC__)
                         "gcc " __VERSION__,
#else
                         "unknown",
#endif
                         "cuda", describe_cuda());
}

static PyMethodDef module_methods[] = {
    {"attention_mass", (PyCFunction)(void (*)(void))module_attention_mass, METH_VARARGS | METH_KEYWORDS,
     "attention_mass($module, kv_cache, query_cache, steps, block_table=None, *, out, workspace,\n"
     "               recent_window=256, softmax_scale=0.0, stream=None)\n--\n\n"
     "Exact attention mass of every prior position (arXiv 2505.16950, section 3.2) into out, float32\n"
     "[num_layers, num_steps, max_prior], of the caches' device, zero behind each step's prior. Arguments as in\n"
     "Processor.rewrite; the result is waited for."},
    {"select_top_k", (PyCFunction)(void (*)(void))module_select_top_k, METH_VARARGS | METH_KEYWORDS,
     "select_top_k($module, mass, lengths, out, *, backend=\"cpu\")\n--\n\n"
     "The out.shape[1] largest of the first lengths[row] entries of each row of mass (float32 [rows, n]; lengths\n"
     "int64 [rows]) into out, int64 [rows, top_k]: ascending, then -1. Ties go to the smaller position."},
    {"backends", module_backends, METH_NOARGS,
     "backends($module)\n--\n\n"
     "The backends compiled in, best first: dicts with name, backend, variant, device and available."},
    {"default_backend", module_default_backend, METH_NOARGS,
     "default_backend($module)\n--\n\n"
     "What \"cpu\" stands for here, for instance \"cpu:avx512_bf16\"; BOTTLENECKED_CPU_ISA forces a lower one."},
    {"build_info", module_build_info, METH_NOARGS,
     "build_info($module)\n--\n\n"
     "How the extension was built: version, abi_version, compiler, and cuda: compiled, architectures, available\n"
     "(is there a device), and device, driver and cublaslt, as far as they are there."},
    {0},
};

static PyObject *add_exception(PyObject *module, const char *name, const char *doc, PyObject *base,
                               PyObject *second_base)
{
    char qualified[64];
    PyOS_snprintf(qualified, sizeof qualified, "bottleneck_ext.%s", name);
    PyObject *bases = second_base == NULL ? PyTuple_Pack(1, base) : PyTuple_Pack(2, base, second_base);
    if (bases == NULL)
        return NULL;
    PyObject *exception = PyErr_NewExceptionWithDoc(qualified, doc, bases, NULL);
    Py_DECREF(bases);
    if (exception != NULL && PyModule_AddObjectRef(module, name, exception) < 0)
        Py_CLEAR(exception);
    return exception;
}

static int add_exceptions(PyObject *module, module_state *state)
{
    state->bottleneck_error =
        add_exception(module, "BottleneckError", "Base of the package's own errors.", PyExc_Exception, NULL);
    if (state->bottleneck_error == NULL)
        return -1;
    state->invalid_argument_error =
        add_exception(module, "InvalidArgumentError", "The caller's mistake; nothing was written.",
                      state->bottleneck_error, PyExc_ValueError);
    state->unsupported_error =
        add_exception(module, "UnsupportedError", "Valid, but not implemented here; nothing was written.",
                      state->bottleneck_error, PyExc_NotImplementedError);
    state->device_error = add_exception(module, "DeviceError", "The device failed; nothing was written.",
                                        state->bottleneck_error, PyExc_RuntimeError);
    state->rebuild_needed_error =
        add_exception(module, "RebuildNeededError", "The write began and failed: discard these sequences.",
                      state->bottleneck_error, PyExc_RuntimeError);
    return state->invalid_argument_error == NULL || state->unsupported_error == NULL || state->device_error == NULL ||
                   state->rebuild_needed_error == NULL
               ? -1
               : 0;
}

static PyTypeObject *add_type(PyObject *module, PyType_Spec *spec)
{
    PyTypeObject *type = (PyTypeObject *)PyType_FromModuleAndSpec(module, spec, NULL);
    if (type != NULL && PyModule_AddType(module, type) < 0)
        Py_CLEAR(type);
    return type;
}

static int module_exec(PyObject *module)
{
    module_state *state = module_state_of(module);
    if (add_exceptions(module, state) < 0)
        return -1;
    state->kv_cache_type = add_type(module, &kv_cache_spec);
    state->query_cache_type = add_type(module, &query_cache_spec);
    state->workspace_type = add_type(module, &workspace_spec);
    state->processor_type = add_type(module, &processor_spec);
    state->linear_type = add_type(module, &linear_spec);
    state->empty_tuple = PyTuple_New(0);
    state->dlpack_keywords = Py_BuildValue("{s:(ii)}", "max_version", 1, 0);
    state->dict_name = PyUnicode_InternFromString("__dict__");
    state->exchange_name = PyUnicode_InternFromString("__dlpack_c_exchange_api__");
    state->requires_grad_name = PyUnicode_InternFromString("requires_grad");
    if (state->kv_cache_type == NULL || state->query_cache_type == NULL || state->workspace_type == NULL ||
        state->processor_type == NULL || state->linear_type == NULL || state->empty_tuple == NULL ||
        state->dlpack_keywords == NULL || state->dict_name == NULL || state->exchange_name == NULL ||
        state->requires_grad_name == NULL)
        return -1;
    return PyModule_AddStringConstant(module, "__version__", BTX_VERSION);
}

static int module_traverse(PyObject *module, visitproc visit, void *arg)
{
    module_state *state = module_state_of(module);
    Py_VISIT(state->bottleneck_error);
    Py_VISIT(state->invalid_argument_error);
    Py_VISIT(state->unsupported_error);
    Py_VISIT(state->device_error);
    Py_VISIT(state->rebuild_needed_error);
    Py_VISIT(state->kv_cache_type);
    Py_VISIT(state->query_cache_type);
    Py_VISIT(state->processor_type);
    Py_VISIT(state->linear_type);
    Py_VISIT(state->workspace_type);
    Py_VISIT(state->dlpack_keywords);
    Py_VISIT(state->empty_tuple);
    Py_VISIT(state->dict_name);
    Py_VISIT(state->exchange_name);
    Py_VISIT(state->requires_grad_name);
    return 0;
}

static int module_clear(PyObject *module)
{
    module_state *state = module_state_of(module);
    Py_CLEAR(state->bottleneck_error);
    Py_CLEAR(state->invalid_argument_error);
    Py_CLEAR(state->unsupported_error);
    Py_CLEAR(state->device_error);
    Py_CLEAR(state->rebuild_needed_error);
    Py_CLEAR(state->kv_cache_type);
    Py_CLEAR(state->query_cache_type);
    Py_CLEAR(state->processor_type);
    Py_CLEAR(state->linear_type);
    Py_CLEAR(state->workspace_type);
    Py_CLEAR(state->dlpack_keywords);
    Py_CLEAR(state->empty_tuple);
    Py_CLEAR(state->dict_name);
    Py_CLEAR(state->exchange_name);
    Py_CLEAR(state->requires_grad_name);
    return 0;
}

static void module_free(void *module)
{
    module_clear(module);
}

/* Since 3.12 a module says whether interpreters with a GIL of their own may share it: all state is the module's, so
 * they may. 3.11, whose headers and stable ABI we keep to, does not know the slot and refuses what it does not know. */
#ifndef Py_mod_multiple_interpreters
#define Py_mod_multiple_interpreters 3
#define Py_MOD_PER_INTERPRETER_GIL_SUPPORTED ((void *)2)
#endif

static PyModuleDef_Slot module_slots[] = {
    {Py_mod_exec, module_exec},
    {Py_mod_multiple_interpreters, Py_MOD_PER_INTERPRETER_GIL_SUPPORTED},
    {0, NULL},
};

static PyModuleDef_Slot module_slots_311[] = {
    {Py_mod_exec, module_exec},
    {0, NULL},
};

#define MODULE_DEF(slots)                                                                                              \
    {                                                                                                                  \
        .m_base = PyModuleDef_HEAD_INIT,                                                                               \
        .m_name = "bottleneck_ext._core",                                                                              \
        .m_doc = "The compiled core of bottlenecked: KV cache rewriting by a Cache Processor.",                        \
        .m_size = sizeof(module_state),                                                                                \
        .m_methods = module_methods,                                                                                   \
        .m_slots = slots,                                                                                              \
        .m_traverse = module_traverse,                                                                                 \
        .m_clear = module_clear,                                                                                       \
        .m_free = module_free,                                                                                         \
    }

static struct PyModuleDef module_def = MODULE_DEF(module_slots);
static struct PyModuleDef module_def_311 = MODULE_DEF(module_slots_311);

PyMODINIT_FUNC PyInit__core(void)
{
    return PyModuleDef_Init(Py_Version >= 0x030C0000 ? &module_def : &module_def_311);
}
