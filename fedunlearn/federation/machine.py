"""A machine of its own: whose images it has and where they lie, as whoever starts its SuperNode says."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from fedunlearn.config import Config
from fedunlearn.data.folders import revealed
from fedunlearn.errors import UserError, printable

HOW = """start its SuperNode with --node-config 'client="NAME" data-root="/path/of/its/images"'"""


class Machine(NamedTuple):
    """What `--node-config` says of a SuperNode.

    Attributes:
        client: the name of its client, or of several with commas between them.
        root: absolute path of the images; of several clients each has a folder of its name in it.
        home: state folder for the decoded copy; empty takes $FEDUNLEARN_HOME or ~/.fedunlearn.
    """

    client: str
    root: str
    home: str = ""

    @classmethod
    def of(cls, node_config: Mapping[str, Any]) -> "Machine | None":
        """Read what `--node-config` says; None where it names no client, as in a simulation.

        Example:
            >>> Machine.of({"client": "hospital_b", "data-root": "/data/b"})
            Machine(client='hospital_b', root='/data/b', home='')
        """
        if "client" not in node_config:
            return None
        return cls(*(str(node_config.get(name, "")) for name in ("client", "data-root", "home")))

    @property
    def words(self) -> list[str]:
        """Give the names between commas."""
        return [word.strip() for word in self.client.split(",")]

    def clients(self, names: list[str]) -> list[int]:
        """Give the numbers of the machine's clients, in ascending order.

        Args:
            names: of all clients of the run, by number.

        Raises:
            UserError: the run has no such client.

        Example:
            >>> Machine("b, a", "/data").clients(["a", "b", "c, d"]), Machine("c, d", "/data").clients(["a", "c, d"])
            ([0, 1], [1])
        """
        words = [self.client] if self.client in names else self.words
        for word in words:
            if word not in names:
                hint = "give the client's name, not a number" if word.isdecimal() else "the run has no such client"
                raise UserError(f"this node says that it is client {printable(word)}: {hint}")
        return sorted({names.index(word) for word in words})


def settled(config: Config, machine: Machine | None) -> tuple[Config, list[int] | None]:
    """Give the settings of a message as they are on this machine, and the clients that are here; None for all of them.

    Raises:
        UserError: every machine has its own images, and this one does not say whose.
    """
    if not config.partition.is_on_nodes:
        return config, None
    if machine is None or not machine.root:
        raise UserError(f"this node does not say whose images it has, and where: {HOW}")
    data, split = config.data.model_copy(update={"root": machine.root}), config.partition
    names = revealed(split.names, [machine.client, *machine.words])
    here = {"data": data, "home": machine.home, "partition": split.model_copy(update={"names": names})}
    return config.model_copy(update=here), machine.clients(names)
