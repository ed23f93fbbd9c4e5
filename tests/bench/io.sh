# shellcheck shell=bash disable=SC2154
# Part of tests/bench/run: the same fio loads on all file systems.

# The other file systems: libfuse's own example, with O_DIRECT taken off its backing files (with it,
# the kernel refuses the buffers that it writes from), and bindfs, which takes it off by itself.
start_others() {
    local source=/usr/share/doc/libfuse3-dev/examples/passthrough_ll.c
    mkdir -p "$work/passthrough" "$work/bindfs"
    [ -e "$source" ] || gzip -dc "$source.gz" >"$work/passthrough_ll.c" 2>/dev/null || return 0
    [ ! -e "$source" ] || cp "$source" "$work/passthrough_ll.c"
    sed -i 's/fi->flags & ~O_NOFOLLOW/fi->flags \& ~O_NOFOLLOW \& ~040000/' "$work/passthrough_ll.c"
    [ ! -e /usr/share/doc/libfuse3-dev/examples/passthrough_helpers.h ] ||
        cp /usr/share/doc/libfuse3-dev/examples/passthrough_helpers.h "$work/"
    # shellcheck disable=SC2046
    if gcc -O2 -w -DHAVE_FALLOCATE -o "$work/pll" "$work/passthrough_ll.c" $(pkg-config --cflags --libs fuse3); then
        "$work/pll" -f -o "source=$work/lower,cache=never" "$work/passthrough" >/dev/null 2>&1 &
        others+=($!)
        wait_for 10 mountpoint -q "$work/passthrough" || true
    fi
    bindfs -f "$work/lower" "$work/bindfs" >/dev/null 2>&1 &
    others+=($!)
    wait_for 10 mountpoint -q "$work/bindfs" || true
}

# load NAME -> fio arguments
load() {
    case $1 in
        'write 4k depth 1') echo --rw=randwrite --bs=4k --iodepth=1 ;;
        'write 4k depth 32') echo --rw=randwrite --bs=4k --iodepth=32 ;;
        'read 4k depth 1') echo --rw=randread --bs=4k --iodepth=1 ;;
        'read 4k depth 32') echo --rw=randread --bs=4k --iodepth=32 ;;
        'write 1M sequential') echo --rw=write --bs=1M --iodepth=4 ;;
        'write 4k fdatasync') echo --rw=randwrite --bs=4k --iodepth=1 --fdatasync=1 ;;
    esac
}
loads=('write 4k depth 1' 'write 4k depth 32' 'read 4k depth 1' 'read 4k depth 32'
    'write 1M sequential' 'write 4k fdatasync')
systems=(native unprotected tracked delivered passthrough bindfs)

# file SYSTEM: tracked and delivered are the same disk of the same VM, without and with shipping.
file() {
    case $1 in
        native) echo "$work/lower/native.img" ;;
        unprotected) echo "$work/mounted/plain.img" ;;
        tracked | delivered) echo "$work/mounted/disk.img" ;;
        *) echo "$work/$1/$1.img" ;;
    esac
}

# one SYSTEM LOAD: "I/O per second, CPU microseconds per I/O"
one() {
    local path before after
    path=$(file "$1")
    case $1 in
        tracked) ai pause bench >/dev/null ;;
        delivered) ai resume bench >/dev/null; ai sync bench --wait >/dev/null ;;
    esac
    before=$(busy)
    # shellcheck disable=SC2046
    fio --name=bench --filename="$path" --size="${size}M" --ioengine=libaio --direct=1 --time_based \
        --runtime="$each" --randrepeat=0 --norandommap --output-format=json $(load "$2") \
        >"$work/fio.json" 2>"$work/fio.err" || { echo '- -'; return; }
    after=$(busy)
    jq -r --argjson busy "$((after - before))" '.jobs[0] | (.read.total_ios + .write.total_ios) as $n |
        "\(.read.iops + .write.iops | floor) \(if $n > 0 then $busy * 10000 / $n | floor else 0 end)"' "$work/fio.json"
}

table_io() {
    local system name round result
    say "" "== I/O: $(nproc) CPUs, $(uname -r), $(stat -f -c %T "$work"), ${size} MiB, O_DIRECT," \
        "   medians of $rounds interleaved rounds of $each s; CPU: of the whole machine" ""
    for system in native passthrough bindfs; do
        fio --name=lay --filename="$work/lower/$system.img" --size="${size}M" --rw=write --bs=1M --output=/dev/null
    done
    for name in plain.img disk.img; do
        fio --name=lay --filename="$work/mounted/$name" --size="${size}M" --rw=write --bs=1M --output=/dev/null
    done
    start_others
    protect bench --disk "$work/mounted/disk.img" --interval 1s
    for round in $(seq "$rounds"); do
        for name in "${loads[@]}"; do
            for system in "${systems[@]}"; do
                result=$(one "$system" "$name")
                printf '%s\t%s\t%s\n' "$name" "$system" "$result" >>"$work/results"
            done
        done
        say "round $round of $rounds done"
    done
    say "" "I/O per second, and of native; below it CPU microseconds per I/O"
    printf '%-20s' ''
    printf '%19s' "${systems[@]}"
    printf '\n'
    for name in "${loads[@]}"; do
        local native='' value cpu line='' below=''
        for system in "${systems[@]}"; do
            value=$(awk -F'\t' -v n="$name" -v s="$system" '$1 == n && $2 == s { split($3, v, " "); print v[1] }' \
                "$work/results" | median)
            cpu=$(awk -F'\t' -v n="$name" -v s="$system" '$1 == n && $2 == s { split($3, v, " "); print v[2] }' \
                "$work/results" | median)
            [ "$system" != native ] || native=$value
            line+=$(awk -v v="$value" -v n="$native" \
                'BEGIN { if (v == "-") printf "%19s", "fails"; else printf "%12d (%4.2f)", v, v / n }')
            below+=$(printf '%16s us' "$cpu")
        done
        printf '%-20s%s\n%-20s%s\n' "$name" "$line" '' "$below"
    done
    say "" "passthrough: libfuse's passthrough_ll, O_DIRECT taken off its backing file, as bindfs does too:" \
        "both answer O_DIRECT from the page cache. tracked: shipping paused. delivered: a cut every" \
        "second, shipped to a vault on the same file system, as fast as it goes."
    cold
    ai unprotect bench >/dev/null
}

# The first write to each region of 4 MiB: it is made hot, durably, before the write.
cold() {
    local system path number=0
    say "" "first write to cold regions (1000 writes of 4 KiB over 8 GiB, depth 1), I/O per second"
    for system in native unprotected tracked; do
        for round in $(seq "$rounds"); do
            number=$((number + 1))
            path=$work/mounted/cold$number.img
            [ $system != native ] || path=$work/lower/cold$number.img
            truncate -s 8G "$path"
            [ $system != tracked ] || protect cold$number --disk "$path" --interval 1h
            fio --name=cold --filename="$path" --size=8G --ioengine=libaio --direct=1 --rw=randwrite --bs=4k \
                --iodepth=1 --number_ios=1000 --randrepeat=0 --output-format=json >"$work/fio.json"
            jq -r '.jobs[0].write.iops | floor' "$work/fio.json" >>"$work/cold.$system"
            [ $system != tracked ] || ai unprotect cold$number >/dev/null
            rm -f -- "$path"
        done
        printf '%-12s %s\n' $system "$(median <"$work/cold.$system")"
    done
}
