# Shared by ./quickstart, ./check and scripts/*: messages, and what the scripts look for on the machine.
# Sourced, not run. Results go to stdout, all messages to stderr.
# shellcheck shell=bash

say() { printf '%s\n' "$*" >&2; }

# fail CODE MESSAGE [HINT]: one line on what went wrong, one on what to do, then the exit code.
fail() {
    printf 'error: %s\n' "$2" >&2
    if [[ -n ${3:-} ]]; then printf '  hint: %s\n' "$3" >&2; fi
    exit "$1"
}

have() { command -v "$1" >/dev/null 2>&1; }

cache_dir() { printf '%s\n' "${PIPIT_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/pipit}"; }

# total_size PATH...: what files and folders hold together, as a person reads it.
total_size() {
    du -sbc "$@" 2>/dev/null | awk 'END { if ($1 >= 1e6) printf "%.1f MB\n", $1 / 1e6; else printf "%.1f kB\n", $1 / 1e3 }'
}

# cargo, also where rustup installed it but the shell was not started again.
find_cargo() {
    if ! have cargo && [[ -x $HOME/.cargo/bin/cargo ]]; then PATH="$HOME/.cargo/bin:$PATH"; fi
    have cargo || fail 1 "cargo is not there" "install the Rust toolchain (rustup, or the packages of your distribution), at least $(wanted_rust)"
    local found
    found=$(cargo --version | awk '{print $2}')
    if [[ $(printf '%s\n%s\n' "$(wanted_rust)" "${found%%-*}" | sort -V | head -n1) != "$(wanted_rust)" ]]; then
        fail 1 "cargo $found is older than $(wanted_rust)" "rustup update stable"
    fi
}

wanted_rust() { sed -n 's/^rust-version = "\(.*\)"/\1/p' "$(repository)/Cargo.toml"; }

repository() { (cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd); }

target_dir() { printf '%s\n' "${CARGO_TARGET_DIR:-$(repository)/target}"; }

# make_venv DIR REQUIREMENTS: a virtual environment with just these packages; reused while the list is the same.
make_venv() {
    local dir=$1 requirements=$2 stamp
    stamp="$(sha256sum <"$requirements" | cut -d' ' -f1) $(python3 -c 'import sys; print(sys.executable, sys.version_info[:3])')"
    if [[ -f $dir/.whole && $(<"$dir/.whole") == "$stamp" ]]; then return; fi
    rm -rf "$dir"
    python3 -m venv "$dir"
    "$dir/bin/python" -m pip install --quiet --disable-pip-version-check -r "$requirements"
    printf '%s\n' "$stamp" >"$dir/.whole"
}

# make_node_modules DIR PACKAGE: DIR/node_modules with just what PACKAGE/package-lock.json names; reused while that is
# the same.
make_node_modules() {
    local dir=$1 package=$2 stamp
    stamp="$(sha256sum <"$package/package-lock.json" | cut -d' ' -f1) $(node --version)"
    if [[ -f $dir/.whole && $(<"$dir/.whole") == "$stamp" ]]; then return; fi
    rm -rf "$dir"
    mkdir -p "$dir"
    cp "$package/package.json" "$package/package-lock.json" "$dir"
    (cd "$dir" && npm ci --ignore-scripts --no-audit --no-fund --loglevel=error) >&2 || return
    printf '%s\n' "$stamp" >"$dir/.whole"
}
