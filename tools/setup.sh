#!/bin/sh
# Installs the Debian packages that lorad needs; the one list of them, for the Makefile, the
# Dockerfile and the CI alike. Does nothing, and does not touch the package index, when all are
# there. As root, or with sudo, it installs; otherwise it prints the line to run and exits 1.
#
#   tools/setup.sh              what building and testing need
#   tools/setup.sh --build      what building needs
#   tools/setup.sh --runtime    the shared libraries that a finished build/lorad needs (Debian 12)
#   tools/setup.sh --list       prints the packages (after --build or --runtime: of that set)
set -eu

build="gcc g++ libc6-dev make cmake ninja-build pkgconf ccache
libuv1-dev node-llhttp libjansson-dev libsqlite3-dev libssl-dev libpcre2-dev libutf8proc-dev libdnnl-dev"
tests="libcmocka-dev python3 python3-venv ca-certificates curl git"
runtime="libuv1 libjansson4 libsqlite3-0 libssl3 libpcre2-8-0 libutf8proc2 libdnnl2 libgomp1"

packages="$build $tests"
list=no
for argument in "$@"; do
    case $argument in
    --build) packages=$build ;;
    --runtime) packages=$runtime ;;
    --list) list=yes ;;
    *)
        echo "usage: tools/setup.sh [--build|--runtime] [--list]" >&2
        exit 2
        ;;
    esac
done

if [ $list = yes ]; then
    for package in $packages; do echo "$package"; done
    exit 0
fi
if ! command -v dpkg-query >/dev/null; then
    echo "setup: not a Debian system; lorad needs what these packages hold:" $packages >&2
    exit 0
fi

missing=""
for package in $packages; do
    state=$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null || true)
    [ "$state" = installed ] || missing="$missing $package"
done
[ -n "$missing" ] || exit 0

install="apt-get install -y --no-install-recommends$missing"
as_root=""
if [ "$(id -u)" -ne 0 ]; then
    as_root="sudo"
    [ -t 0 ] || as_root="sudo -n" # nobody is there to type a password
    if ! command -v sudo >/dev/null || ! $as_root true 2>/dev/null; then
        echo "setup: packages are missing; as root run:" >&2
        echo "apt-get update && $install" >&2
        exit 1
    fi
fi
echo "setup: installing$missing" >&2
$as_root env DEBIAN_FRONTEND=noninteractive apt-get update -q
$as_root env DEBIAN_FRONTEND=noninteractive $install
