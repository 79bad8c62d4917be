# Sourced by the examples that train without a GPU: sets up the environment, the data, the policy and a Ray cluster.
#
# The first run makes .venv. $work contains data, models and logs of all examples; each is made once.
work="$PWD/runs/quickstart"
models="$work/models"

patches/make_venv.sh
cores=$(nproc) # before cpu.env, because nproc obeys its OMP_NUM_THREADS
export PATH="$PWD/.venv/bin:$PATH" TORCH_EXTENSIONS_DIR="$PWD/.venv/cache/torch_extensions" PYTHONWARNINGS=ignore
set -a
. examples/cpu.env
set +a

free_port() { python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }

train() { # train NAME MODULE FLAGS...: run a training command of OpenRLHF on all cores; makes $models/NAME
    local name=$1
    shift
    OMP_NUM_THREADS=$cores RANK=0 LOCAL_RANK=0 WORLD_SIZE=1 MASTER_ADDR=127.0.0.1 MASTER_PORT=$(free_port) \
        python -m "$@" --ds.zero_stage 0 --ds.param_dtype fp32 --ds.attn_implementation eager --data.max_len 48 \
        --train.batch_size 32 --train.micro_batch_size 32 --ckpt.output_dir "$models/$name.partial" 2>&1 |
        python examples/quickstart/watch.py "$work/$name.log"
    mv "$models/$name.partial" "$models/$name"
}

make_policy() {
    mkdir -p "$models"
    if [ ! -e "$work/data/ready" ]; then
        echo "== the review corpus"
        python examples/quickstart/prepare.py "$work/data"
        touch "$work/data/ready"
    fi
    if [ ! -e "$models/policy" ]; then
        echo "== the policy: supervised fine-tuning on the reviews (about four minutes; log: runs/quickstart/policy.log)"
        train policy openrlhf.cli.train_sft --model.model_name_or_path "$work/data/untrained" --data.dataset \
            "$work/data/sft.jsonl" --data.input_key prompt --data.output_key response --data.input_template '{}' \
            --train.max_epochs 2 --adam.lr 2e-3
    fi
}

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
