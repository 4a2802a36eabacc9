"""The denoiser with a known answer that the tests of the chains use too."""

from tests.fixpoint_diffusion.conftest import mixture

__all__ = ["mixture"]
