"""Two self-signed certificates for localhost, made for tests only and good until 2126; they secure nothing."""
from __future__ import annotations

from pathlib import Path

CERTIFICATES = ("""\
-----BEGIN CERTIFICATE-----
MIIBpDCCAUugAwIBAgIUVDjOPHlxWq9K7z5UATN+Sk3rvzUwCgYIKoZIzj0EAwIw
GTEXMBUGA1UEAwwOcXVhcnRldCB0ZXN0IDEwIBcNMjYxMTIzMDAwOTU2WhgPMjEy
NjEwMzAwMDA5NTZaMBkxFzAVBgNVBAMMDnF1YXJ0ZXQgdGVzdCAxMFkwEwYHKoZI
zj0CAQYIKoZIzj0DAQcDQgAE6s1quj9+al94cHs0wPjcMHZenHTEYvrxJWFOH/N8
9OnsjeDqol7PzhDaWnwoF17Wd2/eIMSQ+4X0jwQQ4tgRUqNvMG0wHQYDVR0OBBYE
FNaBMBQ5i0hPay816o/WHrSjSlyQMB8GA1UdIwQYMBaAFNaBMBQ5i0hPay816o/W
HrSjSlyQMA8GA1UdEwEB/wQFMAMBAf8wGgYDVR0RBBMwEYIJbG9jYWxob3N0hwR/
AAABMAoGCCqGSM49BAMCA0cAMEQCIH1atugU/rV4Cz+LdYCw46ydPXuS7S1bjleT
GU1Q+oZDAiB7t3rQOcJEofb5mSTALGZdxGGObb22ZP7+WWJ0jIYKyw==
-----END CERTIFICATE-----
""", """\
-----BEGIN CERTIFICATE-----
MIIBpTCCAUugAwIBAgIUElYkCaAfOjV6RRVCQWWw76x5PHAwCgYIKoZIzj0EAwIw
GTEXMBUGA1UEAwwOcXVhcnRldCB0ZXN0IDIwIBcNMjYxMTIzMDAwOTU2WhgPMjEy
NjEwMzAwMDA5NTZaMBkxFzAVBgNVBAMMDnF1YXJ0ZXQgdGVzdCAyMFkwEwYHKoZI
zj0CAQYIKoZIzj0DAQcDQgAEjIqQajpf+ZNkDlOLMjB4OgzW8oWKRrFD0rzcZ9Lp
0yHA8RFBhNWPheXakvWVzWS/Qqn2Ymm1+IKOy+n5BL8AFKNvMG0wHQYDVR0OBBYE
FISjN6MLkhOD50LMTUOTfn8/gFsuMB8GA1UdIwQYMBaAFISjN6MLkhOD50LMTUOT
fn8/gFsuMA8GA1UdEwEB/wQFMAMBAf8wGgYDVR0RBBMwEYIJbG9jYWxob3N0hwR/
AAABMAoGCCqGSM49BAMCA0gAMEUCIQD8c8zLs0MAeHOmHFsGtSbemYofsyopbfWg
U7mbUtS6kQIgKhhHTyOzM2ciYS71uJblBJZT98KmnD1SYm2DrVZTFxg=
-----END CERTIFICATE-----
""")
KEYS = ("""\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgMKm08JIUK4e89ABo
5eXqConaaDpDyXBFdqU2D34bzWyhRANCAATqzWq6P35qX3hwezTA+Nwwdl6cdMRi
+vElYU4f83z06eyN4OqiXs/OENpafCgXXtZ3b94gxJD7hfSPBBDi2BFS
-----END PRIVATE KEY-----
""", """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgm5ckRtSKU9k7psws
eAednEHELYN4NJ8eWsyCjDPWvxahRANCAASMipBqOl/5k2QOU4syMHg6DNbyhYpG
sUPSvNxn0unTIcDxEUGE1Y+F5dqS9ZXNZL9CqfZiabX4go7L6fkEvwAU
-----END PRIVATE KEY-----
""")


def write(folder: Path, number: int = 0) -> tuple[Path, Path]:
    """Certificate and key number `number` as files; the same names each time, so that one takes the other's place."""
    certificate, key = folder / "server.crt", folder / "server.key"
    certificate.write_text(CERTIFICATES[number])
    key.write_text(KEYS[number])
    return certificate, key
