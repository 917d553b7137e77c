import socket

import datasets
import huggingface_hub.constants as constants
import pytest

from nemo_lmpo.data.hub import cache_only_without_network
from nemo_lmpo.data.read import open_source
from nemo_lmpo.data.tokenizer import load_tokenizer
from nemo_lmpo.errors import ConfigError, DataError


@pytest.fixture
def resolves(monkeypatch):
    def set_up(known):
        def getaddrinfo(host, port):
            assert (host, port) == ("huggingface.co", 443)
            if not known:
                raise socket.gaierror("not known")

        monkeypatch.setattr(constants, "ENDPOINT", "https://huggingface.co")
        monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
        for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.delenv(name, raising=False)

    return set_up


def test_cache_only_where_the_host_is_unknown_and_only_inside(resolves, monkeypatch):
    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    resolves(known=False)
    with cache_only_without_network():
        assert constants.HF_HUB_OFFLINE
        assert datasets.config.HF_HUB_OFFLINE
    assert before == (constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE)
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy:8080")
    with cache_only_without_network():
        assert before == (constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE)


def test_network_is_used_where_there_is_one(resolves):
    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    resolves(known=True)
    with cache_only_without_network():
        assert before == (constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE)


def test_errors_come_at_once_without_network(resolves):
    resolves(known=False)
    with pytest.raises(DataError, match=r"nobody/no-such-data .*could not be loaded from the hub"):
        open_source("nobody/no-such-data", "train")
    with pytest.raises(ConfigError, match=r"model\.tokenizer=nobody/no-such-tokenizer cannot be loaded"):
        load_tokenizer("nobody/no-such-tokenizer")
