# shellcheck shell=bash disable=SC2154
# Part of tests/bench/run: what protection costs the host.

# written_by_daemon PID, peak_of PID: bytes given to disks; resident MiB, at most.
written_by_daemon() { awk '/^write_bytes/ { print $2 }' "/proc/$1/io"; }
peak_of() { awk '/^VmHWM/ { print int($2 / 1024) }' "/proc/$1/status"; }

# Shipping is paused: what the embedded vault writes is not the tracking's.
cost_of_tracking() {
    local path=$work/mounted/cost.img pid before after written
    fio --name=lay --filename="$path" --size=1G --rw=write --bs=1M --end_fsync=1 --output=/dev/null
    protect cost --disk "$path" --interval 1s
    ai pause cost >/dev/null
    pid=$(daemon_pid)
    before=$(written_by_daemon "$pid")
    fio --name=cost --filename="$path" --size=1G --rw=randwrite --bs=4k --direct=1 --rate=5m --time_based \
        --runtime=20 --ioengine=libaio --iodepth=4 --output-format=json >"$work/fio.json"
    after=$(written_by_daemon "$pid")
    written=$(jq '.jobs[0].write.io_bytes' "$work/fio.json")
    say "bytes written for tracking at 5 MB/s: $(awk -v d=$((after - before)) -v w="$written" \
        'BEGIN { printf "%.2f %%", (d - w) * 100 / w }') of the guest's own $((written >> 20)) MiB"
    ai resume cost >/dev/null
    ai sync cost --wait >/dev/null
}

cost_in_memory() {
    local path=$work/mounted/cost.img pid
    pid=$(daemon_pid)
    # The peak is that of what follows.
    echo 5 >"/proc/$pid/clear_refs"
    fio --name=cost --filename="$path" --size=1G --rw=randwrite --bs=4k --direct=1 --rate=20m --time_based \
        --runtime=20 --ioengine=libaio --iodepth=4 --output=/dev/null
    fio --name=cost --filename="$path" --size=1G --rw=write --bs=1M --direct=1 --ioengine=libaio --iodepth=4 \
        --output=/dev/null
    ai sync cost --wait >/dev/null
    say "memory of the daemon, a cut each second, after 400 MiB at random and 1 GiB in a row:" \
        "    $(peak_of "$pid") MiB at most, and $(du -cm /dev/shm/afterimage-* | awk 'END { print $1 }') MiB in /dev/shm"
    ai unprotect cost --purge --yes >/dev/null
    rm -f -- "$path"
}

cost_of_idling() {
    local n pid before after
    for n in $(seq 30); do
        truncate -s 64M "$work/mounted/idle$n.img"
        protect "idle$n" --disk "$work/mounted/idle$n.img" --interval 30s
    done
    pid=$(daemon_pid)
    sleep 10
    before=$(awk '{ print $14 + $15 }' "/proc/$pid/stat")
    sleep 60
    after=$(awk '{ print $14 + $15 }' "/proc/$pid/stat")
    say "30 idle VMs at 30 s: $(awk -v t=$((after - before)) -v h="$(getconf CLK_TCK)" \
        'BEGIN { printf "%.2f %%", t * 100 / h / 60 }') of a core"
    for n in $(seq 30); do
        ai unprotect "idle$n" --purge --yes >/dev/null
        rm -f -- "$work/mounted/idle$n.img"
    done
}

table_costs() {
    say "" "== costs"
    cost_of_tracking
    cost_in_memory
    cost_of_idling
}
