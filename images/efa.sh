#!/bin/sh
# Build rdma-core, libfabric with the provider for EFA, and aws-ofi-nccl: efa.sh BUILD APP PREFIX. Runs in a build stage
# of trainer-cuda.Dockerfile, which sets the versions and checksums. NCCL finds PREFIX/lib/libnccl-net.so.
set -eu
build=$1 app=$2 prefix=$3

apt-get update
apt-get install --yes --no-install-recommends autoconf automake bzip2 ca-certificates cmake curl libhwloc-dev \
    libnl-3-dev libnl-route-3-dev libtool make pkg-config

fetch() { # PATH SHA256: download an archive, check it, and unpack it in a new folder that is then the current one
    curl --fail --location --silent --show-error --output archive "$EFA_SOURCES/$1"
    echo "$2  archive" | sha256sum --check -
    folder=$(mktemp --directory)
    tar --extract --file archive --directory "$folder" --strip-components 1
    cd "$folder"
}

# The CUDA wheel of the lock file, and the headers that belong to it, in the layout of a CUDA installation.
cuda=$(mktemp --directory)
cat > "$cuda/requirements.txt" << END
nvidia-cuda-crt==$CUDA_VERSION --hash=sha256:$CUDA_CRT_SHA256 --hash=sha256:$CUDA_CRT_AARCH64_SHA256
nvidia-nvml-dev==$CUDA_VERSION --hash=sha256:$NVML_SHA256 --hash=sha256:$NVML_AARCH64_SHA256
END
"$build/bin/pip" install --no-cache-dir --no-deps --require-hashes --target "$cuda" -r "$cuda/requirements.txt"
mv "$cuda/nvidia/cu13/include" "$cuda/include"
cp -R "$app"/lib/python3*/site-packages/nvidia/cu13/include/. "$cuda/include/"
ln -s "$(echo "$app"/lib/python3*/site-packages/nvidia/cu13/lib)" "$cuda/lib64"
test -e "$cuda/lib64/libcudart_static.a"

fetch "linux-rdma/rdma-core/releases/download/v$RDMA_CORE_VERSION/rdma-core-$RDMA_CORE_VERSION.tar.gz" \
    "$RDMA_CORE_SHA256"
cmake -S . -B build -DCMAKE_BUILD_TYPE=Release -DCMAKE_INSTALL_PREFIX="$prefix" -DCMAKE_INSTALL_LIBDIR=lib \
    -DCMAKE_INSTALL_RUNDIR=/run -DNO_PYVERBS=1 -DNO_MAN_PAGES=1 -DENABLE_STATIC=0
cmake --build build --parallel "$(nproc)"
cmake --install build

fetch "ofiwg/libfabric/releases/download/v$LIBFABRIC_VERSION/libfabric-$LIBFABRIC_VERSION.tar.bz2" "$LIBFABRIC_SHA256"
# The CUDA driver is loaded when it is there: the image also starts on a node without a GPU.
./configure --prefix="$prefix" --disable-static --enable-only --enable-efa="$prefix" --with-cuda="$cuda" \
    --enable-cuda-dlopen
make --jobs "$(nproc)" install

fetch "aws/aws-ofi-nccl/archive/v$AWS_OFI_NCCL_VERSION.tar.gz" "$AWS_OFI_NCCL_SHA256"
./autogen.sh
./configure --prefix="$prefix" --with-libfabric="$prefix" --with-cuda="$cuda" --enable-platform-aws --disable-tests
make --jobs "$(nproc)" install

# The final image has no package of these libraries.
for name in hwloc nl-3 nl-route-3 udev; do
    cp --no-dereference /usr/lib/*-linux-gnu/lib$name.so.* /lib/*-linux-gnu/lib$name.so.* "$prefix/lib/" 2> /dev/null || true
done
rm -rf "$prefix/include" "$prefix/sbin" "$prefix/lib/pkgconfig" "$prefix/lib/cmake" "$prefix"/lib/*.la
export LD_LIBRARY_PATH="$prefix/lib"
! ldd "$prefix/lib/libnccl-net.so" | grep --extended-regexp 'not found|=> (/usr)?/lib/.*/lib(hwloc|nl-|udev|fabric|efa)'
