#!/usr/bin/env bash
# Makes the soft-RoCE rig: a kernel, an initramfs, and an emulator to boot them. All of it is unpacked from packages of this
# Debian or Ubuntu into one directory. Nothing is installed, no right of root is used, and what is installed has no say.
set -euo pipefail

here=$(dirname -- "$(realpath -- "${BASH_SOURCE[0]}")")
readonly here
# shellcheck source=tests/rdma/host-tools.sh
. "$here/host-tools.sh"

# What runs here: the emulator, and what the initramfs is made with.
readonly host_packages=(qemu-system-x86 seabios kmod xz-utils zstd busybox-static)

# The machine inside. The libraries are those that programs built here are linked with.
readonly guest_packages=(bash busybox-static kmod iproute2 perftest rdmacm-utils ibverbs-utils ibverbs-providers libibverbs1
    libstdc++6 libgcc-s1)

# Debian's, and Ubuntu's: the first that exists (the plain one of 22.04 is older than corelane takes). They pull in the kernel
# proper by a name with its version in it.
readonly kernel_packages=(linux-image-amd64 linux-image-generic-hwe-22.04 linux-image-generic)

readonly wanted_modules=(rdma_rxe rdma_ucm veth dummy sch_netem sch_tbf virtio_pci 9p 9pnet_virtio)
# Part of some kernels, and a module of others.
readonly helpful_modules=(crc32_generic crc32c_generic ib_umad)

# Documentation, and the data of programs that are not run.
readonly useless_in_guest=(usr/share etc/init.d etc/pam.d var)

usage() {
    cat <<'TEXT'
Usage: tests/rdma/build.sh DIRECTORY

Makes the rig in DIRECTORY, unless one made by the same recipe is there: downloads 130 MB and takes about half a minute.
The package sources are those of this machine's apt.
TEXT
}

fail() {
    printf 'cannot make the RDMA rig: %s\n' "$*" >&2
    exit 1
}

# All that decides what is in the rig, but for the versions of packages: what is made stays until this changes.
recipe() {
    cat -- "$here/build.sh" "$here/host-tools.sh" "$here/init"
    grep -E '^(ID|VERSION_ID)=' /etc/os-release
}

is_ready() {
    recipe | cmp -s - "$rig/made"
}

# --- packages, by an apt with lists and caches of its own, which believes that nothing is installed

private_apt() {
    local state=$work/apt
    LC_ALL=C apt-get -q -y \
        -o Dir::State="$state" -o Dir::State::Lists="$state/lists" -o Dir::State::status="$state/status" \
        -o Dir::Cache="$state/cache" -o APT::Install-Recommends=false -o APT::Sandbox::User="$(id -un)" \
        -o Acquire::Languages=none -o Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false \
        -o Acquire::Retries=2 -o Acquire::http::Timeout=30 "$@"
}

# A source that cannot be reached is not an error yet: what counts is whether the packages can be had.
fetch_package_lists() {
    mkdir -p -- "$work/apt/lists/partial" "$work/apt/cache/archives/partial"
    : >"$work/apt/status"
    private_apt update || true
}

# Prints the packages named and all that they depend on.
with_dependencies() {
    private_apt --simulate install "$@" | sed -n 's/^Inst \([^ ]*\) .*/\1/p'
}

# unpack DIRECTORY PACKAGE...   downloads the packages, and unpacks them into one tree.
unpack() {
    local tree=$1 archive
    shift
    rm -rf -- "$work/archives"
    mkdir -p -- "$work/archives" "$tree"
    (cd -- "$work/archives" && private_apt download "$@") || fail "could not download $*"
    for archive in "$work"/archives/*.deb; do
        dpkg-deb -x "$archive" "$tree"
    done
    rm -rf -- "$work/archives"
    merge_usr "$tree"
}

# Some packages still have /bin, /lib and so on as directories, and some rely on the links into /usr.
merge_usr() {
    local tree=$1 name
    for name in bin sbin lib lib64; do
        mkdir -p -- "$tree/usr/$name"
        if [[ -d $tree/$name && ! -L $tree/$name ]]; then
            cp -a -- "$tree/$name/." "$tree/usr/$name/"
            rm -rf -- "${tree:?}/$name"
        fi
        ln -sfn "usr/$name" "$tree/$name"
    done
}

# unpack_all DIRECTORY PACKAGE...   with dependencies; base-files brings nothing but links that get in the way.
unpack_all() {
    local tree=$1 packages
    shift
    packages=$(with_dependencies "$@" | grep -vx base-files) || fail "apt knows no way to have ${*}"
    # shellcheck disable=SC2086 # a list of names
    unpack "$tree" $packages
}

# --- the kernel

unpack_kernel() {
    local meta packages=""
    for meta in "${kernel_packages[@]}"; do
        packages=$(with_dependencies "$meta" 2>/dev/null | grep -E '^linux-(image|modules|modules-extra)-[0-9]') && break
    done
    [[ -n $packages ]] || fail "no package of a kernel: looked for ${kernel_packages[*]}"
    # shellcheck disable=SC2086 # a list of names
    unpack "$work/kernel" $packages
    kernel_version=$(cd -- "$work/kernel/usr/lib/modules" && echo *)
    cp -- "$work/kernel/boot/vmlinuz-$kernel_version" "$work/new/vmlinuz"
    run_kmod depmod -b "$work/kernel" "$kernel_version"
}

# The modules go in decompressed: that is slow inside.
copy_modules() {
    local file
    [[ -n $(module_files rdma_rxe) ]] || fail "the kernel $kernel_version has no rdma_rxe"
    module_files "${wanted_modules[@]}" "${helpful_modules[@]}" | while read -r file; do
        copy_module "$file"
    done
    cp -- "$work/kernel/usr/lib/modules/$kernel_version"/modules.builtin* "$work/guest/usr/lib/modules/$kernel_version/"
    run_kmod depmod -b "$work/guest" "$kernel_version"
}

# Prints the files of the modules named and of those that they depend on.
module_files() {
    local module
    for module in "$@"; do
        run_kmod modprobe -d "$work/kernel" -S "$kernel_version" --show-depends "$module" 2>/dev/null || true
    done | awk '$1 == "insmod" && !seen[$2]++ { print $2 }'
}

copy_module() {
    local file=$1 copy
    copy=$work/guest/usr/lib/modules/$kernel_version/$(basename -- "$file")
    mkdir -p -- "$(dirname -- "$copy")"
    case $file in
        *.xz) run_tool xz -dc <"$file" >"${copy%.xz}" ;;
        *.zst) run_tool zstd -dc <"$file" >"${copy%.zst}" ;;
        *) cp -- "$file" "$copy" ;;
    esac
}

# --- the machine inside

make_guest() {
    local name
    unpack_all "$work/guest" "${guest_packages[@]}"
    for name in "${useless_in_guest[@]}"; do
        rm -rf -- "${work:?}/guest/$name"
    done
    mkdir -p -- "$work"/guest/{dev,etc,proc,root,results,run,sys,tmp,var}
    link_busybox
    printf 'root:x:0:0::/root:/bin/bash\n' >"$work/guest/etc/passwd"
    printf 'root:x:0:\n' >"$work/guest/etc/group"
    printf '127.0.0.1 localhost rig\n::1 localhost\n' >"$work/guest/etc/hosts"
    install -m 755 -- "$here/init" "$work/guest/init"
}

# It stands in for every program that no package brought; the shell is bash, which runs ip and tc instead of applets.
link_busybox() {
    local applet
    ln -sfn bash "$work/guest/usr/bin/sh"
    "$work/guest/usr/bin/busybox" --list | while read -r applet; do
        if ! guest_has "$applet"; then
            ln -s busybox "$work/guest/usr/bin/$applet"
        fi
    done
}

# A link counts, too: what it points to may be there only for the machine inside.
guest_has() {
    local place
    for place in "$work"/guest/usr/{bin,sbin}/"$1"; do
        [[ ! -e $place && ! -L $place ]] || return 0
    done
    return 1
}

# Not compressed: the emulated machine would take longer to unpack it than the emulator takes to read it.
pack_guest() {
    (cd -- "$work/guest" && find . | "$tools/usr/bin/busybox" cpio -o -H newc -R 0:0) >"$work/new/initramfs"
}

make_rig() {
    rm -rf -- "$work"
    mkdir -p -- "$work/new"
    fetch_package_lists
    unpack_all "$work/new/host" "${host_packages[@]}"
    make_guest
    unpack_kernel
    copy_modules
    pack_guest
    rm -rf -- "$rig/host" "$rig/made"
    mv -- "$work/new"/* "$rig/"
    recipe >"$rig/made"
    rm -rf -- "$work"
}

main() {
    case ${1:--h} in
        -h | --help)
            usage
            return
            ;;
    esac
    command -v apt-get >/dev/null || fail "it is made of Debian's packages, and this system has no apt-get"
    mkdir -p -- "$1"
    rig=$(realpath -- "$1")
    work=$rig/work
    exec 9>"$rig/lock"
    flock 9
    if is_ready; then
        return
    fi
    use_tools "$work/new/host"
    make_rig
    printf 'made the RDMA rig in %s: kernel %s, initramfs of %d MB\n' \
        "$rig" "$kernel_version" $(($(stat -c %s "$rig/initramfs") / 1000000))
}

main "$@"
