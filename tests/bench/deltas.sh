# shellcheck shell=bash disable=SC2154
# Part of tests/bench/run: how long it takes until what changed is safe.

# delta NAME SIZE MIB GAP: MIB in runs of 64 KiB, GAP KiB apart, on a sparse disk of SIZE; seconds from
# its cut until it is durable in the vault, and until it is applied there and can be opened.
delta() {
    local path=$work/mounted/$1.img start applied durable
    truncate -s "$2" "$path"
    protect "$1" --disk "$path" --interval 1h
    fio --name=delta --filename="$path" --size="$2" --rw=write --bs=64k --io_size="$3M" --zonemode=strided \
        --zonesize=64k --zonerange="$4k" --zoneskip=0 --ioengine=psync --end_fsync=1 --output=/dev/null ||
        { say "fio fails"; return 1; }
    start=$(now)
    ai sync "$1" --wait >/dev/null
    applied=$(since "$start")
    durable=$(ai points "$1" --json | jq '
        def ms: (.[:19] + "Z" | fromdate) * 1000 + (.[20:23] | tonumber);
        .points[-1] | ((.arrived | ms) - (.time | ms)) / 1000')
    ai unprotect "$1" --purge --yes >/dev/null
    rm -f -- "$path"
    printf '%s %s\n' "$durable" "$applied"
}

# plain_copy: seconds for cp of 1 GiB with fsync.
plain_copy() {
    local start
    start=$(now)
    cp -- "$work/lower/gib" "$work/lower/gib.copy"
    sync -- "$work/lower/gib.copy"
    printf '%s\n' "$(since "$start")"
    rm -f -- "$work/lower/gib.copy"
}

# column_median NUMBER FILE
column_median() { awk -v n="$1" '{ print $n }' "$2" | median; }

table_deltas() {
    local round name plain durable
    say "" "== deltas, medians of $rounds"
    fio --name=lay --filename="$work/lower/gib" --size=1G --rw=write --bs=1M --end_fsync=1 --output=/dev/null
    for round in $(seq "$rounds"); do
        plain_copy >>"$work/plain"
        delta "scattered$round" 64G 1024 4096 >>"$work/scattered"
        delta "small$round" 10G 64 1024 >>"$work/small"
        delta "large$round" 8T 64 1024 >>"$work/large"
    done
    plain=$(median <"$work/plain") durable=$(column_median 1 "$work/scattered")
    say "1 GiB in runs of 64 KiB over 64 GiB: durable after $durable s, can be opened after \
$(column_median 2 "$work/scattered") s; cp of 1 GiB with fsync: $plain s; ratio \
$(awk -v a="$durable" -v b="$plain" 'BEGIN { printf "%.2f", a / b }')"
    for name in small large; do
        say "64 MiB on a disk of $([ $name = small ] && echo '10 GiB' || echo '8 TiB, sparse'): durable after \
$(column_median 1 "$work/$name") s, can be opened after $(column_median 2 "$work/$name") s"
    done
    rm -f -- "$work/lower/gib"
}
