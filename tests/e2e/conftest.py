import pytest
from server import Server


@pytest.fixture(scope="session")
def dummy():
    server = Server("--adapter", "a=dummy:rank=16,seed=7,modules=all",
                    "--adapter", "b=dummy:rank=8,seed=8,modules=qkvo",
                    "--adapter", "c=dummy:rank=33,seed=9,modules=all", "--dtype", "f32")
    yield server
    assert server.stop() == 0
