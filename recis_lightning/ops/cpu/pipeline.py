"""Numba's compiler, without the parts that kernels do not need.

A function that kernels call is optimised with each kernel it is linked into; by itself it is
neither optimised nor made machine code, as it is never called from Python. Passes for what kernels
do not contain are left out: closures, ``with``, array expressions, overloads to be inlined.

A first training step of two features compiled for 5.4 s with Numba's own pipeline on a Xeon's core,
and for 4.0 s with this one and without the cyclic collector; ``first_step`` halves that.
"""

from __future__ import annotations

from numba.core import compiler
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import DefaultPassBuilder
from numba.core.compiler_machinery import PassManager, register_pass
from numba.core.typed_passes import NativeLowering

_LEFT_OUT = {
    "WithLifting",
    "InlineClosureLikes",
    "RewriteSemanticConstants",
    "GenericRewrites",
    "RewriteDynamicRaises",
    "MakeFunctionToJitFunction",
    "FindLiterallyCalls",
    "LiteralUnroll",
    "LiteralPropagationSubPipelinePass",
    "InlineOverloads",
    "NopythonRewrites",
    "DumpParforDiagnostics",
}


class _LinkedLibrary(JITCodeLibrary):
    """Code that is linked into kernels, and not made machine code itself."""

    def finalize(self):
        for library in dict.fromkeys(self._linking_libraries):
            module = library._get_module_for_linking()
            self._final_module.link_in(module, preserve=True)
        self._finalize_dynamic_globals()
        self._finalized = True


@register_pass(mutates_CFG=True, analysis_only=False)
class _HelperLowering(NativeLowering):
    """Lower a function that only kernels call."""

    _name = "helper_lowering"

    def run_pass(self, state):
        state.library = _LinkedLibrary(state.targetctx.codegen(), state.func_id.func_qualname)
        state.library.enable_object_caching()
        super().run_pass(state)
        lowered = state["cr"]
        key = [state.library].count  # Numba asks for a built-in function as an entry
        state.targetctx.insert_user_function(key, lowered.fndesc, [state.library])
        state["cr"] = lowered._replace(cfunc=key)
        return True


def _passes(state):
    passes = DefaultPassBuilder.define_nopython_pipeline(state).passes
    return [entry for entry in passes if entry[0].__name__ not in _LEFT_OUT]


def _finalized(name, passes):
    manager = PassManager(name)
    for kind, description in passes:
        manager.add_pass(kind, description)
    manager.finalize()
    return [manager]


class KernelCompiler(compiler.CompilerBase):
    """Pipeline of kernels."""

    def define_pipelines(self):
        """Return Numba's passes without those that kernels do not need."""
        return _finalized("kernel", _passes(self.state))


class HelperCompiler(compiler.CompilerBase):
    """Pipeline of functions that kernels call."""

    def define_pipelines(self):
        """Return the same passes, with lowering alone in the place of machine code."""
        self.state.flags.no_compile = True
        passes = _passes(self.state)
        passes = [
            (_HelperLowering, text) if k is NativeLowering else (k, text) for k, text in passes
        ]
        return _finalized("helper", passes)


__all__ = ["HelperCompiler", "KernelCompiler"]
