"""Pictures of a simulated scene, without a window.

Drawn through EGL, or OSMesa where EGL is missing; `MUJOCO_GL=egl` or `=osmesa` chooses one. No anti-aliasing, shadows
or reflections: in software they cost ten times the picture, and without them a small picture is exactly a sampling of
a large one.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import sys
import threading
from collections.abc import Mapping

import numpy as np

from vla_edge.sim.scene import GROUP_ARMS, GROUP_BODY, GROUP_SCENE, MAX_HEIGHT, MAX_WIDTH
from vla_edge.types import VlaEdgeError

CAMERAS = {"head": (GROUP_SCENE, GROUP_ARMS), "overview": (GROUP_SCENE, GROUP_ARMS, GROUP_BODY)}
"""Cameras of the tabletop, and the geom groups each draws: the head camera sits inside the head and must not see it."""

_INSTALL = "install libegl1 and libgl1-mesa-dri, or libosmesa6"


class RenderError(VlaEdgeError):
    """Nothing can be drawn on this machine, or not what was asked for."""


class SceneRenderer:
    """Draws one model. An OpenGL context belongs to a thread: make and use a renderer in the same one.

    Args:
        cameras: name -> the geom groups it draws; None for what MuJoCo draws by itself.
    """

    def __init__(self, model, cameras: Mapping[str, tuple[int, ...] | None] = CAMERAS):
        import mujoco

        self._model = model
        self._context = _gl_context(MAX_WIDTH, MAX_HEIGHT)
        self._context.make_current()
        self._thread = threading.get_ident()
        try:
            self._mjr = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100.value)
        except mujoco.FatalError as error:
            raise RenderError(f"MuJoCo cannot use the OpenGL found here ({error}); {_INSTALL}") from None
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN.value, self._mjr)
        self._scene = mujoco.MjvScene(model, maxgeom=400)
        flags = mujoco.mjtRndFlag
        for flag in (flags.mjRND_SHADOW, flags.mjRND_REFLECTION, flags.mjRND_HAZE):
            self._scene.flags[flag] = 0
        self._sky = flags.mjRND_SKYBOX
        self._options = {name: _draw_groups(groups) for name, groups in cameras.items()}
        self._camera = mujoco.MjvCamera()
        self._camera.type = mujoco.mjtCamera.mjCAMERA_FIXED

    def render(self, data, height: int, width: int, camera: str = "head") -> np.ndarray:
        """(height, width, 3) uint8 RGB of the state in `data`, whose poses have to be up to date.

        Raises:
            RenderError: no such camera, a size out of range, or another thread than the one that made the renderer.
        """
        import mujoco

        if camera not in self._options:
            raise RenderError(f"there is no camera {camera!r}; choose one of {', '.join(self._options)}")
        if not (0 < height <= MAX_HEIGHT and 0 < width <= MAX_WIDTH):
            raise RenderError(f"a picture of {width}x{height} cannot be drawn; the largest is {MAX_WIDTH}x{MAX_HEIGHT}")
        if threading.get_ident() != self._thread:
            raise RenderError("the renderer was made in another thread; give every thread a world of its own")
        self._context.make_current()
        self._scene.flags[self._sky] = camera != "head"
        self._camera.fixedcamid = self._model.camera(camera).id
        mujoco.mjv_updateScene(
            self._model, data, self._options[camera], None, self._camera, mujoco.mjtCatBit.mjCAT_ALL.value, self._scene
        )
        viewport = mujoco.MjrRect(0, 0, width, height)
        picture = np.empty((height, width, 3), np.uint8)
        mujoco.mjr_render(viewport, self._scene, self._mjr)
        mujoco.mjr_readPixels(picture, None, viewport, self._mjr)
        return np.ascontiguousarray(picture[::-1])

    def close(self) -> None:
        """Frees the context; the renderer cannot be used again."""
        if self._context is not None:
            self._context.make_current()
            self._mjr.free()
            # MuJoCo 4.0 frees an OSMesa context through a call PyOpenGL refuses; the memory goes with the process.
            with contextlib.suppress(ctypes.ArgumentError):
                self._context.free()
            self._context = None


def _draw_groups(groups: tuple[int, ...] | None):
    import mujoco

    options = mujoco.MjvOption()
    if groups is None:
        return options
    options.geomgroup[:] = 0
    options.sitegroup[:] = 0
    for group in groups:
        options.geomgroup[group] = 1
    return options


def _gl_context(width: int, height: int):
    """The first kind of context that works here.

    Raises:
        RenderError: none does.
    """
    wanted = os.environ.get("MUJOCO_GL", "").strip().lower()
    kinds = {"egl": ("egl",), "osmesa": ("osmesa",)}.get(wanted, ("egl", "osmesa"))
    platform, reasons = os.environ.get("PYOPENGL_PLATFORM"), []
    for kind in kinds:
        os.environ["PYOPENGL_PLATFORM"] = kind
        try:
            module = importlib.import_module(f"mujoco.{kind}")
            # Freed by its renderer alone: at interpreter exit the libraries it needs may be gone before it.
            owned = type("OwnedContext", (module.GLContext,), {"__del__": lambda self: None})
            context = owned(width, height)
            # MuJoCo's own loader of OpenGL reads this when the renderer is made.
            os.environ["MUJOCO_GL"] = kind
            return context
        except Exception as error:
            reasons.append(f"{kind}: {str(error).split('. ')[0] or type(error).__name__}")
            _forget_platform(platform)
    raise RenderError(
        f"nothing can be drawn without a display here ({'; '.join(reasons)}); "
        f"{_INSTALL}"
    )


def _forget_platform(platform: str | None) -> None:
    """PyOpenGL picks its platform once, when first imported; a failed try must not decide for the next."""
    for name in list(sys.modules):
        if name == "OpenGL" or name.startswith(("OpenGL.", "mujoco.egl", "mujoco.osmesa")):
            del sys.modules[name]
    if platform is None:
        os.environ.pop("PYOPENGL_PLATFORM", None)
    else:
        os.environ["PYOPENGL_PLATFORM"] = platform
