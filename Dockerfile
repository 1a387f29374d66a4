# Two images on Debian 12:  docker build --target cpu .   docker build --target cuda .
# The packages are those of tools/setup.sh; the CUDA toolkit comes from NVIDIA's own repository.
#   docker run -p 8000:8000 -v /models:/models IMAGE serve --model /models/NAME --host 0.0.0.0

FROM debian:12-slim AS tools
COPY tools/setup.sh /setup.sh
RUN /setup.sh --build && rm -rf /var/lib/apt/lists/*

FROM tools AS build-cpu
COPY . /src
RUN cmake -G Ninja -S /src -B /build -DLORAD_TESTS=OFF -DLORAD_CUDA=OFF && ninja -C /build

FROM debian:12-slim AS cpu
COPY tools/setup.sh /setup.sh
RUN /setup.sh --runtime && rm -rf /var/lib/apt/lists/*
COPY --from=build-cpu /build/lorad /build/lorad-bench /usr/local/bin/
EXPOSE 8000
ENTRYPOINT ["lorad"]

FROM tools AS build-cuda
ARG CUDA=13-0
ADD https://developer.download.nvidia.com/compute/cuda/repos/debian12/x86_64/cuda-keyring_1.1-1_all.deb /
RUN apt-get update && apt-get install -y --no-install-recommends ca-certificates \
    && dpkg -i /cuda-keyring_1.1-1_all.deb && apt-get update \
    && apt-get install -y --no-install-recommends cuda-nvcc-$CUDA cuda-cudart-dev-$CUDA \
       libcublas-dev-$CUDA && rm -rf /var/lib/apt/lists/*
COPY . /src
RUN cmake -G Ninja -S /src -B /build -DLORAD_TESTS=OFF -DLORAD_CUDA=ON && ninja -C /build

FROM cpu AS cuda
ARG CUDA=13-0
ADD https://developer.download.nvidia.com/compute/cuda/repos/debian12/x86_64/cuda-keyring_1.1-1_all.deb /
RUN apt-get update && apt-get install -y --no-install-recommends ca-certificates \
    && dpkg -i /cuda-keyring_1.1-1_all.deb && apt-get update \
    && apt-get install -y --no-install-recommends cuda-cudart-$CUDA libcublas-$CUDA \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build-cuda /build/lorad /build/lorad-bench /usr/local/bin/
