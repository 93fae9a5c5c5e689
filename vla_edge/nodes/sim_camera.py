"""The simulated cameras: draw in a process of their own, so that physics never waits for a picture."""

from __future__ import annotations

import multiprocessing
import select
import signal
from dataclasses import dataclass

from vla_edge.sim.world import Snapshot


@dataclass(frozen=True)
class View:
    """One camera of the world as a topic.

    Attributes:
        camera: name in the world.
        topic: fully resolved, for the raw image; the compressed one is published beside it.
        height, width: pixels.
        every: draws one of this many states it is sent.
    """

    camera: str
    topic: str
    height: int
    width: int
    every: int = 1


class CameraProcess:
    """Draws what it is shown. A state that comes while it is drawing is drawn only if no newer one has come.

    Args:
        views: what to draw.
        namespace: of its node.
        nice: steps back behind physics and control.
        jpeg_quality: of compressed images.
    """

    def __init__(self, views: tuple[View, ...], namespace: str, nice: int, jpeg_quality: int):
        context = multiprocessing.get_context("spawn")
        receiver, self._sender = context.Pipe(duplex=False)
        self._process = context.Process(
            target=_draw, args=(receiver, views, namespace, nice, jpeg_quality), name="sim_camera", daemon=True
        )
        self._process.start()
        receiver.close()

    @property
    def alive(self) -> bool:
        """Whether it still draws."""
        return self._process.is_alive()

    def show(self, stamp_ns: int, snapshot: Snapshot) -> None:
        """A new state of the world; returns at once, and leaves it out while the pipe is full."""
        try:
            # A pipe that can be written to takes a page whole, which is more than a state fills.
            if select.select([], [self._sender], [], 0.0)[1]:
                self._sender.send((stamp_ns, snapshot))
        except (BrokenPipeError, OSError):
            pass  # the camera is gone: `alive` tells

    def close(self) -> None:
        """Ends the process."""
        self._sender.close()
        self._process.join(5.0)
        if self._process.is_alive():
            self._process.terminate()
            self._process.join(2.0)


def _draw(receiver, views: tuple[View, ...], namespace: str, nice: int, jpeg_quality: int) -> None:
    import rclpy
    from rclpy.signals import SignalHandlerOptions
    from sensor_msgs.msg import CompressedImage, Image

    from vla_edge.nodes import convert, middleware, qos, run
    from vla_edge.sim.world import TabletopWorld

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the owner closes the pipe
    run.nice(nice)
    middleware.prepare()
    rclpy.init(args=[], signal_handler_options=SignalHandlerOptions.NO)
    node = rclpy.create_node("sim_camera", namespace=namespace, start_parameter_services=False)
    publishers = [
        (
            node.create_publisher(Image, view.topic, qos.SENSOR_OUT),
            node.create_publisher(CompressedImage, f"{view.topic}/compressed", qos.SENSOR_OUT),
        )
        for view in views
    ]
    world, count = TabletopWorld(), 0
    try:
        while True:
            stamp_ns, snapshot = receiver.recv()
            while receiver.poll():
                stamp_ns, snapshot = receiver.recv()
            restored = False
            for view, (raw, compressed) in zip(views, publishers):
                wanted = [publisher.get_subscription_count() > 0 for publisher in (raw, compressed)]
                if count % view.every or not any(wanted):
                    continue
                if not restored:
                    world.restore(snapshot)
                    restored = True
                pixels = world.render(view.height, view.width, view.camera)
                if wanted[0]:
                    raw.publish(convert.to_image(stamp_ns, f"{view.camera}_camera", pixels))
                if wanted[1]:
                    compressed.publish(convert.to_jpeg(stamp_ns, f"{view.camera}_camera", pixels, jpeg_quality))
            count += 1
    except EOFError:
        pass
    finally:
        world.close()
        node.destroy_node()
        rclpy.shutdown()
