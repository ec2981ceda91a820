# The machinery of ./quickstart: a step runs a command beside a line of progress, keeps its log, is skipped when its
# result is there already, and leaves nothing half-written and no process behind, however it ends.
# Sourced after common.sh, not run.
# shellcheck shell=bash

steps_folder='' # logs, stamps and unfinished results, inside the work folder
steps_key=''    # hash over everything that the results so far depend on
running=()      # process groups of what runs in the background
table_order=()  # names of the steps in the closing table
declare -A table_title=() table_time=() table_size=() background_group=()

# begin_steps WORK: make the work folder and take it for this run alone.
begin_steps() {
    mkdir -p "$1/.steps" || fail 1 "$1 cannot be made" "name another folder with PIPIT_WORK="
    steps_folder=$(cd "$1/.steps" && pwd)
    [[ -w $steps_folder ]] || fail 1 "$1 cannot be written" "name another folder with PIPIT_WORK="
    exec 9>"$steps_folder/lock"
    if have flock && ! flock -n 9; then
        fail 1 "another quickstart runs in $1" "wait for it, or name another folder with PIPIT_WORK="
    fi
    local free
    free=$(df -Pk "$1" | awk 'NR == 2 { print $4 }')
    if ((free < 1000 * ${PIPIT_DISK_MB:-3000})); then
        fail 1 "only $((free / 1000)) MB are free on the disk of $1" "free 3 GB, or name another folder with PIPIT_WORK="
    fi
    rm -rf "$steps_folder/part"
    trap 'end_steps $?' EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM HUP
}

end_steps() {
    local group
    trap '' INT TERM HUP
    if [[ -t 2 ]]; then printf '\r\033[K' >&2; fi
    if [[ $1 == 130 || $1 == 143 ]] && ((${#running[@]})); then say 'stopping ...'; fi
    for group in "${running[@]}"; do end_group "$group"; done
    rm -rf "$steps_folder/part"
    if [[ $1 == 130 || $1 == 143 ]]; then say 'stopped; what was finished is kept, and the next run goes on from there'; fi
}

# end_group GROUP: ask a process group to end; after ten seconds, make it.
end_group() {
    local tries
    kill -TERM -- "-$1" 2>/dev/null || return 0
    for ((tries = 0; tries < 100; tries++)); do
        if ! kill -0 -- "-$1" 2>/dev/null; then break; fi
        sleep 0.1
    done
    kill -KILL -- "-$1" 2>/dev/null || true
    wait "$1" 2>/dev/null || true
}

# depends_on TEXT: results from here on are made again when TEXT differs from that of the run before.
depends_on() { steps_key=$(printf '%s\n%s\n' "$steps_key" "$1" | sha256sum | cut -d' ' -f1); }

# note NAME TITLE TIME: a row of the closing table.
note() {
    if [[ -z ${table_title[$1]:-} ]]; then table_order+=("$1"); fi
    table_title[$1]=$2
    table_time[$1]=$3
}

# note_size NAME FILE...: the size of its results, in that row.
note_size() {
    local name=$1
    shift
    table_size[$name]=$(total_size "$@")
}

# launch NAME STDOUT COMMAND...: start it in a process group of its own (so that Ctrl-C reaches it through us alone),
# with stderr in its log, and stdout in STDOUT or, for "-", on ours.
launch() {
    local log=$steps_folder/$1.log stdout=$2
    shift 2
    : >"$log"
    set -m
    if [[ $stdout == - ]]; then
        "$@" </dev/null 2>>"$log" 9>&- &
    else
        "$@" </dev/null >>"$stdout" 2>>"$log" 9>&- &
    fi
    set +m
    launched=$!
    running+=("$launched")
}

# reap NAME TITLE: the launched command has ended or is about to: take its exit code, and stop here if it failed.
reap() {
    local code=0 group kept=()
    wait "$launched" 2>/dev/null || code=$?
    for group in "${running[@]}"; do
        if [[ $group != "$launched" ]]; then kept+=("$group"); fi
    done
    running=("${kept[@]}")
    if ((code != 0)); then
        say "error: $2: exit code $code; the log $steps_folder/$1.log ends:"
        tail -n 15 "$steps_folder/$1.log" | tr '\r' '\n' | sed 's/^/  | /' >&2
        say '  hint: put it right and start again: finished steps are not repeated'
        exit "$code"
    fi
}

# The last thing that a log says, short enough for one line.
last_line() {
    tail -c 2000 "$1" 2>/dev/null | tr '\r' '\n' | sed 's/\x1b\[[0-9;]*[A-Za-z]//g; s/^ *//' | grep . | tail -n1 | cut -c1-"${2:-90}" || true
}

# run_step NAME TITLE COMMAND...: run it, each time, beside a line of progress; the log keeps all it prints.
run_step() {
    local name=$1 title=$2 started=$SECONDS shown=0 log=$steps_folder/$1.log width=90
    shift 2
    if [[ -t 2 ]]; then width=$(($(tput cols 2>/dev/null || echo 100) - 12)); fi
    say "== $title"
    launch "$name" "$log" "$@"
    while kill -0 "$launched" 2>/dev/null; do
        if [[ -t 2 ]]; then
            printf '\r\033[K   %4d s  %s' $((SECONDS - started)) "$(last_line "$log" "$width")" >&2
        elif ((SECONDS - started - shown >= 15)); then
            shown=$((SECONDS - started))
            say "$(printf '   %4d s  %s' "$shown" "$(last_line "$log" "$width")")"
        fi
        sleep 0.2
    done
    if [[ -t 2 ]]; then printf '\r\033[K' >&2; fi
    reap "$name" "$title"
    note "$name" "$title" "$((SECONDS - started)) s"
}

# show_step NAME TITLE COMMAND...: run it, each time, with its stdout on ours while it comes.
show_step() {
    local name=$1 title=$2 started=$SECONDS
    shift 2
    say "== $title"
    launch "$name" - "$@"
    reap "$name" "$title"
    note "$name" "$title" "$((SECONDS - started)) s"
}

# step NAME TITLE RESULT COMMAND...: make RESULT, a file or a folder, unless the same command made it before.
# @OUT@ in the command is where it is to be made; only when the command succeeds is it moved to RESULT.
step() {
    local name=$1 title=$2 result=$3 part stamp
    shift 3
    depends_on "$name: $*"
    stamp=$steps_folder/$name.done
    if [[ -e $result && -f $stamp && $(head -n1 "$stamp") == "$steps_key" ]]; then
        say "== $title: already there"
        note "$name" "$title" "reused ($(tail -n1 "$stamp"))"
    else
        part=$steps_folder/part/$name
        rm -rf "${result:?}" "$stamp" "$part"
        mkdir -p "$part"
        run_step "$name" "$title" "${@//@OUT@/$part/${result##*/}}"
        mv -T "$part/${result##*/}" "$result"
        printf '%s\n%s\n' "$steps_key" "${table_time[$name]}" >"$stamp"
    fi
    note_size "$name" "$result"
}

# background NAME COMMAND...: start something that goes on while the next steps run.
background() {
    local name=$1
    shift
    launch "$name" "$steps_folder/$name.log" "$@"
    background_group[$name]=$launched
}

# await_port NAME PORT: until what `background` started listens there; if it ends instead, so do we.
await_port() {
    local tries
    launched=${background_group[$1]}
    for ((tries = 0; tries < 600; tries++)); do
        if (exec 3<>"/dev/tcp/127.0.0.1/$2") 2>/dev/null; then return; fi
        if ! kill -0 "$launched" 2>/dev/null; then reap "$1" "$1"; break; fi
        sleep 0.1
    done
    fail 1 "$1 does not listen on port $2" "its log is $steps_folder/$1.log"
}

stop_background() {
    local group=${background_group[$1]} other kept=()
    end_group "$group"
    for other in "${running[@]}"; do
        if [[ $other != "$group" ]]; then kept+=("$other"); fi
    done
    running=("${kept[@]}")
}

port_is_free() { python3 -c 'import socket, sys; socket.socket().bind(("127.0.0.1", int(sys.argv[1])))' "$1" 2>/dev/null; }

free_port() { python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }

show_table() {
    local name
    printf '\n%-52s %16s %12s\n' step time size
    for name in "${table_order[@]}"; do
        printf '%-52s %16s %12s\n' "${table_title[$name]:0:52}" "${table_time[$name]}" "${table_size[$name]:-}"
    done
    printf '%-52s %16s\n' all "$SECONDS s"
}
