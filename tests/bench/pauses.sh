# shellcheck shell=bash disable=SC2154
# Part of tests/bench/run: how long tracking and cuts hold up a write.

# load_on FILE...: random writes of 4 KiB into the first 256 MiB of each; their latencies in
# milliseconds: 99th, 99.9th percentile, longest, over all files.
load_on() {
    local file jobs=()
    for file in "$@"; do jobs+=(--name="$(basename "$file")" --filename="$file"); done
    fio --size=256M --ioengine=libaio --direct=1 --rw=randwrite --bs=4k --iodepth=1 --time_based --runtime=20 \
        --randrepeat=0 --norandommap --group_reporting --output-format=json "${jobs[@]}" >"$work/fio.json"
    jq -r '.jobs[0].write.clat_ns | [.percentile["99.000000"], .percentile["99.900000"], .max] |
        map(. / 1e6 * 100 | round / 100) | join(" ")' "$work/fio.json"
}

# pauses WORDS NAME SIZE COUNT
pauses() {
    local words=$1 name=$2 files=() disks=() n
    for n in $(seq "$4"); do
        files+=("$work/mounted/$name$n.img")
        disks+=(--disk "$work/mounted/$name$n.img")
        truncate -s "$3" "${files[-1]}"
        fio --name=warm --filename="${files[-1]}" --size=256M --rw=write --bs=1M --direct=1 --output=/dev/null
    done
    say "$words: a write takes, ms (99 %, 99.9 %, longest)" "    not protected      $(load_on "${files[@]}")"
    protect "$name" "${disks[@]}" --interval 1s
    # Makes the regions hot.
    for n in "${files[@]}"; do
        fio --name=warm --filename="$n" --size=256M --rw=write --bs=1M --direct=1 --output=/dev/null
    done
    say "    a cut each second  $(load_on "${files[@]}")"
    ai status "$name" --json | jq -r '.vms[0] | .points as $points | .tracking_delay |
        "    of that in tracking, mark, cut and preserve, over \(.writes) writes and \($points) points: " +
        "median \(.median_ns / 1000) us, 99 % below \(.p99_ns / 1000) us, longest \(.max_ns / 1000) us"'
    ai unprotect "$name" --purge --yes >/dev/null
    rm -f -- "${files[@]}"
}

table_pauses() {
    say "" "== pauses"
    pauses 'one disk of 10 GiB' one 10G 1
    pauses 'four disks of 8 TiB, sparse' four 8T 4
}
