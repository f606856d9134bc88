"""Fair shares: a virtual time by which every device is entitled to as much of the server as every other one.

The **virtual time** advances by what is served, divided by the number of devices that have frames here. A frame's
**start tag** is the virtual time at which its device's earlier frames would have been served at its fair share. A frame
whose tag the virtual time has reached (and a little before that) is **eligible**. Among eligible frames the earliest
deadline goes first; the others only fill what eligible ones leave, in order of their tags. So a device that sends
within its share is served by deadline alone, and one that sends more competes with nobody but itself.

This is earliest eligible virtual deadline first (Stoica and Abdel-Wahab, "Earliest Eligible Virtual Deadline First: A
Flexible and Accurate Mechanism for Proportional Share Resource Allocation", 1995) with the frames' real deadlines in
the place of virtual ones; start tags are those of start-time fair queueing (Goyal, Vin and Cheng, SIGCOMM 1996).
"""

from __future__ import annotations

BURST = 2.0
"""A frame is eligible so many times its own cost before the virtual time reaches its tag: cameras are no clocks."""

FORGIVEN_S = 0.5
"""A device that left is charged for at most so many seconds of what it took beyond its share."""


class Shares:
    """Virtual time and the devices' tags, all in seconds of service.

    Attributes:
        virtual: the virtual time.
        active: devices that have frames here.
    """

    def __init__(self) -> None:
        """Nobody is here."""
        self.virtual = 0.0
        self._finish: dict[str, float] = {}
        self._frames: dict[str, int] = {}

    @property
    def active(self) -> int:
        """Devices that have frames here, at least 1."""
        return max(1, len(self._frames))

    def active_with(self, device: str) -> int:
        """Devices that have frames here once this one has."""
        return len(self._frames) + (device not in self._frames)

    def next_start(self, device: str) -> float:
        """The start tag that the device's next frame would get."""
        return max(self.virtual, self._finish.get(device, 0.0))

    def enter(self, device: str, cost: float) -> float:
        """A frame of the device came that will take `cost` seconds of service; its start tag."""
        start = self.next_start(device)
        self._finish[device] = start + cost
        self._frames[device] = self._frames.get(device, 0) + 1
        return start

    def served(self, cost: float) -> None:
        """A frame is being served: everybody's entitlement grows by its part."""
        self.virtual += cost / self.active

    def give_back(self, device: str, cost: float) -> None:
        """A frame leaves without having been served: its device is not charged for it."""
        if device in self._finish:
            self._finish[device] -= cost

    def leave(self, device: str) -> None:
        """A frame of the device is answered or given up."""
        self._frames[device] -= 1
        if self._frames[device]:
            return
        del self._frames[device]
        self._finish[device] = min(self._finish.get(device, 0.0), self.virtual + FORGIVEN_S)
        if not self._frames:  # nobody is owed anything any more
            self._finish.clear()
            self.virtual = 0.0
        elif len(self._finish) > 2 * len(self._frames) + 64:
            self._finish = {d: f for d, f in self._finish.items() if f > self.virtual or d in self._frames}
