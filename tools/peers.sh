#!/bin/sh
# What it is for: bringing in the programs of other people that the peer tests and the fuzzers use ("make peers").
#
# - Debian packages, installed by apt-get when one is missing: QEMU, DPDK (its testpmd is in dpdk-dev), busybox and what
#   a small guest is built from; and the compiler that `make fuzz` uses, with its libFuzzer, sanitizers and symbolizer.
#   That needs root; any other user is told the command to run.
# - A Linux kernel for the guest, unpacked and never installed:
#   ${VHOSTMP_PEERS_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/vhostmp/peers}/kernel/{boot,lib}
#
# Rules: running it twice does nothing the second time; a kernel that is there is kept, newer or not ("--newest" replaces
# it); a download that breaks off leaves nothing half-done behind, since the last step is one rename.
set -eu

packages="qemu-system-x86 ipxe-qemu busybox-static cpio kmod squashfs-tools dpdk dpdk-dev
iproute2 iputils-ping ethtool iperf3 util-linux gcc libc6-dev clang libclang-rt-14-dev llvm-14"
cache=${VHOSTMP_PEERS_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/vhostmp/peers}
newest=no
updated=no

say() { printf 'peers: %s\n' "$*"; }
fail() { printf 'peers: %s\n' "$*" >&2; exit 1; }

case "${1:-}" in
"") ;;
--newest) newest=yes ;;
-h | --help)
    sed -n '2,/^set -eu/{/^set -eu/d;s/^# \{0,1\}//p;}' "$0"
    exit 0
    ;;
*) fail "unknown argument '$1'; only --newest and --help are known" ;;
esac

command -v apt-get >/dev/null && command -v dpkg-query >/dev/null ||
    fail "this is not a Debian system; install by other means: $(echo $packages)"
[ "$(dpkg --print-architecture)" = amd64 ] || fail "the guest kernel and the packages are those of amd64"

update() {
    # Once a run, as root only: another user's apt-get works from the lists that are there.
    [ "$updated" = yes ] || [ "$(id -u)" != 0 ] || apt-get -q update
    updated=yes
}

missing=
for package in $packages; do
    status=$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null || true)
    [ "$status" = installed ] || missing="$missing $package"
done
if [ -n "$missing" ]; then
    [ "$(id -u)" = 0 ] ||
        fail "missing packages; run as root: apt-get update && apt-get install --no-install-recommends$missing"
    say "installing$missing"
    update
    DEBIAN_FRONTEND=noninteractive apt-get -q -y -o DPkg::Lock::Timeout=300 \
        install --no-install-recommends $missing
fi
say "packages: all there"

if [ "$newest" = no ] && [ -e "$cache/kernel/complete" ]; then
    say "kernel: $cache/kernel/$(cd "$cache/kernel" && echo boot/vmlinuz-*)"
    exit 0
fi

# The name of the newest cloud kernel is what the package linux-image-cloud-amd64 depends on.
kernel_package() {
    apt-cache depends linux-image-cloud-amd64 2>/dev/null | sed -n 's/^ *Depends: \(linux-image-[0-9].*\)/\1/p' | head -n 1
}
update
package=$(kernel_package)
[ -n "$package" ] || fail "apt knows no kernel linux-image-cloud-amd64; run as root: apt-get update"

mkdir -p "$cache"
work=$(mktemp -d "$cache/unpack.XXXXXX")
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
say "fetching $package"
(
    cd "$work"
    # As root, apt would warn that its own user cannot write here; it fetches all the same.
    apt-get -q -o APT::Sandbox::User=root download "$package"
)
mkdir "$work/kernel"
dpkg -x "$work"/linux-image-*.deb "$work/kernel"
rm -rf "$work/kernel/usr"
touch "$work/kernel/complete"
if [ -e "$cache/kernel" ]; then
    mv "$cache/kernel" "$work/old"
fi
mv "$work/kernel" "$cache/kernel"
say "kernel: $cache/kernel/$(cd "$cache/kernel" && echo boot/vmlinuz-*)"
