# shellcheck shell=bash disable=SC1091
# Sourced before a run on Ascend NPUs: source test/env_npu.sh. Prepares CANN's environment and says what is missing.

_find_cann() {
    local install root
    install="$(sed -n 's/^Toolkit_InstallPath=//p' /etc/Ascend/ascend_cann_install.info 2>/dev/null | head -n 1)"
    for root in "${install:-}" /usr/local/Ascend/ascend-toolkit/latest /usr/local/Ascend/ascend-toolkit /usr/local/Ascend/nnae; do
        for file in "$root/set_env.sh" "$root/../set_env.sh"; do
            if [ -n "$root" ] && [ -f "$file" ]; then
                printf '%s\n' "$file"
                return 0
            fi
        done
    done
    return 1
}

if _cann="$(_find_cann)"; then
    # shellcheck disable=SC1090
    source "$_cann"
else
    echo "warning: CANN's set_env.sh was not found (/etc/Ascend/ascend_cann_install.info, /usr/local/Ascend): install the CANN toolkit and kernels" >&2
fi
command -v npu-smi >/dev/null || echo "warning: npu-smi was not found: install the Ascend driver and firmware" >&2
"${PYTHON:-python}" -c 'import torch_npu' 2>/dev/null || echo "warning: ${PYTHON:-python} cannot import torch_npu: install the wheel that matches its torch" >&2

# What the Ascend launchers set: asynchronous launches, patience for the first, compiling batch, quiet logs
export TASK_QUEUE_ENABLE="${TASK_QUEUE_ENABLE:-2}"
export HCCL_CONNECT_TIMEOUT="${HCCL_CONNECT_TIMEOUT:-7200}"
export HCCL_WHITELIST_DISABLE="${HCCL_WHITELIST_DISABLE:-1}"
export ASCEND_GLOBAL_LOG_LEVEL="${ASCEND_GLOBAL_LOG_LEVEL:-3}"
unset -f _find_cann
unset _cann
