/* py_module.h - what the extension's files share. Only py_*.c see Python.h.
 *
 * bottleneck_ext._core is an abi3 module for CPython >= 3.11: multi-phase initialisation, heap types, all state in
 * the module, so that several interpreters may import it. Errors of the core become exceptions here and nowhere else.
 */
#ifndef BTX_PY_MODULE_H
#define BTX_PY_MODULE_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "btx.h"

typedef struct module_state {
    /* Exceptions. Owned. */
    PyObject *bottleneck_error;
    PyObject *invalid_argument_error;
    PyObject *unsupported_error;
    PyObject *device_error;
    PyObject *rebuild_needed_error;
    /* Types. Owned. */
    PyTypeObject *kv_cache_type;
    PyTypeObject *query_cache_type;
    PyTypeObject *processor_type;
    PyTypeObject *linear_type;
    PyTypeObject *workspace_type;
    /* The keyword arguments {"max_version": (1, 0)}. Owned. */
    PyObject *dlpack_keywords;
    PyObject *empty_tuple;
    /* "__dict__", "__dlpack_c_exchange_api__", "requires_grad". Owned. */
    PyObject *dict_name, *exchange_name, *requires_grad_name;
} module_state;

module_state *module_state_of(PyObject *module);
/* Of an instance of one of our types (subclasses included). */
module_state *module_state_of_self(PyTypeObject *type);

/* Sets the exception for a status and returns NULL. */
PyObject *raise_status(module_state *state, btx_status status, const btx_error *error);

/* "cpu", "cpu:avx2", "cuda:1": sets UnsupportedError and returns NULL when it is not to be had. The environment
 * variable BOTTLENECKED_CPU_ISA stands for the variant where "cpu" names none. */
const btx_backend *find_backend(module_state *state, const char *name, int32_t *device_index);

/* Tensors borrowed for the duration of a call (py_dlpack.c). */
typedef struct dl_managed_tensor_versioned dl_managed_tensor_versioned;
typedef struct dl_exchange_api dl_exchange_api;

typedef struct borrowed_list {
    Py_ssize_t length;
    /* What owns the memory behind views[i]: one of the two. Owned, [length]. */
    PyObject **capsules;
    dl_managed_tensor_versioned **exports;
    btx_tensor *views;               /* Owned, [length]. */
    PyObject *exchange_type;         /* Owned: the type of the tensor seen last, or NULL. */
    const dl_exchange_api *exchange; /* its DLPack C exchange API, or NULL */
    int exchange_has_gradients;      /* its tensors have requires_grad */
    PyObject *stream; /* on which CUDA tensors are to be ready, as DLPack numbers them; NULL: their own */
} borrowed_list;

/* stream: borrowed for the list's life, or NULL. */
int borrowed_list_init(borrowed_list *list, Py_ssize_t length, PyObject *stream);
/* The stream on which the library of object, the list's first tensor, works now; NULL, the default stream, where it
 * does not say. */
void *current_stream(module_state *state, borrowed_list *list, PyObject *object);
void borrowed_list_clear(borrowed_list *list);
/* Borrows a tensor into views[i], until the list is cleared. -1 with an exception set on failure; name and index (-1:
 * none) say in the message which argument it was. */
int borrow_tensor(module_state *state, borrowed_list *list, Py_ssize_t i, PyObject *object, const char *name,
                  Py_ssize_t index);
/* The same, many times faster, where its type offers to tell what the tensor is without exporting it. For objects that
 * the caller keeps alive; whether it may be written is then not told: read_only says so. */
int look_at_tensor(module_state *state, borrowed_list *list, Py_ssize_t i, PyObject *object, int read_only,
                   const char *name, Py_ssize_t index);

/* py_types.c */
extern PyType_Spec kv_cache_spec, query_cache_spec, processor_spec, linear_spec, workspace_spec;
PyObject *module_attention_mass(PyObject *module, PyObject *args, PyObject *keywords);
PyObject *module_select_top_k(PyObject *module, PyObject *args, PyObject *keywords);

#endif /* BTX_PY_MODULE_H */
