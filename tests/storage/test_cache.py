"""Profiles and digests shared between builds: what another process does, or a broken cache, costs time, never the build."""

import os
import shutil
from pathlib import Path

import pytest

from moe_edge.contracts.manifest import MANIFEST_NAME, Manifest, content_digest, read_manifest
from moe_edge.storage import cache
from moe_edge.storage.folders import LINK_FROM_BYTES, hash_folder, link_or_copy

KEY = "sha256:" + "0" * 64


@pytest.fixture
def profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MOE_EDGE_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "profile"
    folder.mkdir()
    (folder / "statistics").write_bytes(b"7" * (LINK_FROM_BYTES + 1))
    files = hash_folder(folder)
    manifest = Manifest(stage="profile", key=KEY, digest=content_digest(files), files=files)
    (folder / MANIFEST_NAME).write_text(manifest.to_json())
    cache.publish_profile(folder, KEY)
    return folder


def test_a_published_profile_comes_back(profile: Path, tmp_path: Path) -> None:
    cache.reuse_profile(tmp_path / "other", KEY)
    assert (tmp_path / "other" / "statistics").read_bytes() == (profile / "statistics").read_bytes()
    assert [manifest.key for _, manifest in cache.cached_profiles()] == [KEY]


def test_a_cache_that_may_only_be_read_serves_too(
    profile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch = os.utime

    def refused(path: Path, **times: object) -> None:
        if not times:
            raise PermissionError(1, "Operation not permitted", str(path))
        touch(path, **times)

    monkeypatch.setattr(os, "utime", refused)
    cache.reuse_profile(tmp_path / "other", KEY)
    assert read_manifest(tmp_path / "other") == read_manifest(profile)


def test_a_profile_that_is_deleted_meanwhile_is_done_without(
    profile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def collected(home: Path, folder: Path) -> None:
        shutil.rmtree(home)
        raise FileNotFoundError(2, "No such file", str(home / "statistics"))

    monkeypatch.setattr(cache, "mirror", collected)
    cache.reuse_profile(tmp_path / "other", KEY)
    assert not (tmp_path / "other").exists() and "not taken from the cache" in caplog.text


def test_a_file_of_another_build_is_never_written_into(tmp_path: Path) -> None:
    """Two builds that fill one folder at once: the second one's copy would go through the first one's hard link."""
    for name in ("first", "second"):
        (tmp_path / name).write_bytes(name.encode() * LINK_FROM_BYTES)
    link_or_copy(tmp_path / "first", tmp_path / "shared" / "file")
    before = (tmp_path / "first").read_bytes()
    with pytest.raises(FileExistsError):
        link_or_copy(tmp_path / "second", tmp_path / "shared" / "file")
    assert (tmp_path / "first").read_bytes() == before


def test_the_cache_may_be_named_from_the_home_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MOE_EDGE_CACHE", "~/shared")  # in a Dockerfile or a service no shell puts the folder there
    assert cache.cache_root() == tmp_path / "shared"


def test_large_files_are_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_EDGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "known_digests", {})
    big = tmp_path / "big"
    big.write_bytes(bytes(2**20))
    hashed: list[Path] = []
    real = cache.sha256_file
    monkeypatch.setattr(cache, "sha256_file", lambda path: hashed.append(path) or real(path))
    first = cache.remembered_sha256(big)
    assert cache.remembered_sha256(big) == first and hashed == [big]
    monkeypatch.setattr(cache, "known_digests", {})  # as in a new process
    assert cache.remembered_sha256(big) == first and hashed == [big]
    big.write_bytes(bytes(2**20 - 1) + b"x")
    assert cache.remembered_sha256(big) != first and hashed == [big, big]


@pytest.mark.parametrize("content", ["{", "[]", '{"x": 1}'])
def test_a_broken_memo_costs_only_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str) -> None:
    monkeypatch.setenv("MOE_EDGE_CACHE", str(tmp_path))
    monkeypatch.setattr(cache, "known_digests", {})
    (tmp_path / cache.MEMO_NAME).write_text(content)
    big = tmp_path / "big"
    big.write_bytes(os.urandom(2**20))
    assert cache.remembered_sha256(big) == cache.sha256_file(big)


def test_an_unwritable_cache_costs_only_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("MOE_EDGE_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(cache, "known_digests", {})
    big = tmp_path / "big"
    big.write_bytes(os.urandom(2**20))
    assert cache.remembered_sha256(big) == cache.sha256_file(big)


@pytest.mark.parametrize("name", ["statistics", MANIFEST_NAME])
def test_what_is_damaged_is_listed_and_goes_first(profile: Path, tmp_path: Path, name: str) -> None:
    other = "sha256:" + "1" * 64
    cache.publish_profile(profile, other)
    healthy, damaged = (tmp_path / "cache" / "profiles" / (digit * 64) for digit in "01")
    (damaged / name).unlink()  # may be a hard link of the healthy one's
    (damaged / name).write_text("[")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "cache" / "profiles" / "link").symlink_to(tmp_path / "elsewhere")
    found = cache.damaged_profiles()
    assert {home.name: names for home, names in found.items()} == {damaged.name: [name], "link": [MANIFEST_NAME]}
    gone = cache.collect_garbage(sum(cache.bytes_of(manifest) for _, manifest in cache.cached_profiles()))
    assert sorted(gone) == sorted([damaged.name, "link"]) and healthy.is_dir() and (tmp_path / "elsewhere").is_dir()


def test_contents_that_change_at_equal_size_and_time_are_hashed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOE_EDGE_CACHE", str(tmp_path / "cache"))
    big = tmp_path / "big"
    big.write_bytes(bytes(cache.SMALL_BYTES + 5))
    before, state = cache.remembered_sha256(big), big.stat()
    for place in (0, cache.SMALL_BYTES // 2 + 3, cache.SMALL_BYTES + 4):
        with big.open("r+b") as file:
            file.seek(place)
            file.write(b"x")
        os.utime(big, ns=(state.st_atime_ns, state.st_mtime_ns))
        after = cache.remembered_sha256(big)
        assert after == cache.sha256_file(big) != before
        before = after
