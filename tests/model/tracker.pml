/*
 * tracker.pml - the write path, the cut, the shipper, the vault, cooling and
 * crashes of afterimage, as guarded commands. Rules T1..T6 of the
 * tracker are quoted where a step holds them.
 *
 * Every d_step below is one thing that the product does without anybody being
 * able to look in between (one store, one CAS, one read or write of a sector,
 * one durable record). Everything else interleaves freely.
 *
 * All control state is global, so that a kill or a power cut is one step that
 * overwrites it.
 *
 *   disks     2, with K blocks each, a block is 2 sectors, a region is a disk
 *   content   a sector holds its version number: 0, 1, 2, ...
 *   sets      of blocks are bit masks
 *
 * Bounds (-D): K NW OPS MAXCUT MAXGIVEUP MAXKILL MAXCOOL MAXPOWER, and the switches
 * STALL, LIVE, TWO_MAPS. Mutations (-DM_...) break one rule each: see README.md.
 */

#ifndef K
#define K 1             /* blocks per disk: 1 or 2 */
#endif
#ifndef NW
#define NW 2            /* writers (guest queues): 2 or 3 */
#endif
#ifndef MAXCUT
#define MAXCUT 2        /* cuts while guests write; one more follows at the end */
#endif
#ifndef MAXGIVEUP
#define MAXGIVEUP 0     /* T4/T5: times an epoch may give up its cut unforced */
#endif
#ifndef MAXKILL
#define MAXKILL 0       /* daemon kills */
#endif
#ifndef MAXCOOL
#define MAXCOOL 0       /* region coolings; 0: regions are always hot */
#endif
#ifndef MAXPOWER
#define MAXPOWER 0      /* power cuts that are played through (invariant P2b is always checked) */
#endif
#ifdef TWO_MAPS
#define NM 2            /* "a map for the current and one for the frozen epoch" */
#else
#define NM 3            /* one map more: the husk of the epoch before the frozen one */
#endif

#define NB      (2*K)                   /* blocks */
#define NS      (2*NB)                  /* sectors */
#define BIT(b)  (1 << (b))
#define BLK(q)  ((q) / 2)
#define DISK(b) ((b) / K)
#define DMASK(r) (((1 << K) - 1) << ((r)*K))    /* blocks of disk (= region) r */

/* Epoch numbers run modulo 6 (a multiple of 2 and of 3), to be finite in LIVE. */
#define NEXT(e) (((e) + 1) % 6)
#define PREV(e) (((e) + 5) % 6)
#define M(e)    ((e) % NM)              /* the map of epoch e */

/*
 * The guests' writes. Writer w does writes 2w and 2w+1, the second only after
 * the first is acknowledged: 0 -> 1 and 2 -> 3 are dependent pairs that cross
 * the disks in opposite directions. Writer 2 does one write, 4.
 */
#define MAXOPS 5
#ifndef OPS
#define OPS 2
#endif
#define NOPS(w) ((w) == 2 -> 1 : OPS)
#if K == 1
#define Q0(o) ((o)==0 -> 0 : ((o)==1 -> 2 : ((o)==2 -> 2 : ((o)==3 -> 0 : 1))))
#define Q1(o) ((o)==0 -> 1 : ((o)==1 -> 2 : ((o)==2 -> 3 : ((o)==3 -> 0 : 1))))
#else   /* write 0 crosses a block boundary */
#define Q0(o) ((o)==0 -> 1 : ((o)==1 -> 4 : ((o)==2 -> 4 : ((o)==3 -> 2 : 3))))
#define Q1(o) ((o)==0 -> 2 : ((o)==1 -> 4 : ((o)==2 -> 5 : ((o)==3 -> 3 : 3))))
#endif
#define MAXV  (NW + 1 + 2*MAXKILL)        /* versions of one sector */
#define OP(w) (2*(w) + wn[w])
#define REG(w) DISK(BLK(Q0(OP(w))))

/* ---- state that survives a kill (shared memory) ------------------------- */
byte E = 1;             /* T1: the epoch number of the VM */
byte mk[NM];            /* map: marked blocks */
byte rd[NM];            /* ... of these, read by the shipper    (frozen -> read) */
byte pr[NM];            /* ... of these, preserved by a writer  (frozen -> preserved) */
#define FROZEN(m,b) ((mk[m] & BIT(b)) && !((rd[m] | pr[m]) & BIT(b)))
byte pcopy[NS];         /* preserved blocks, in memory or in the frozen HRL */
bit  fz;                /* an epoch is frozen: number PREV(E) */
#define F PREV(E)
bit  gaveup;            /* the frozen epoch has given up its cut */
byte pend;              /* blocks of epochs that gave up, to go with the next cut */
bit  hot[2] = 1;        /* region is hot, as writers see it */

/* ---- state that survives a power cut ------------------------------------ */
byte disk[NS];          /* content as read() shows it */
byte sdisk[NS];         /* content that is surely on the medium */
byte dirty;             /* blocks with writes since the last sync */
byte dm[NM];            /* HRL: durable part of each map */
byte dpend;             /* HRLs of epochs that gave up */
bit  dhot[2] = 1;       /* hot-region log: last word on the region ... */
byte dact[2];           /* ... and number of its last activation */

/* ---- the vault ----------------------------------------------------------- */
byte part[NB];          /* the block's part: 0 none, 1 under way, 2 durable */
byte pc[NS];            /* its content */
byte vault[NS];         /* content of the newest point */
bit  vcom;              /* the frozen epoch is committed there */

/* ---- the process --------------------------------------------------------- */
byte infl[NM];          /* writers in flight, by epoch */
byte pin[2];            /* writers that pinned the region */
bit  acting[2];         /* somebody is activating it */
byte syn[2];            /* blocks a running sync will make durable: 0 shipper, 1 cooler */

byte wpc[NW];           /* writer: step */
byte wn[NW];            /* writes acknowledged */
byte we[NW];            /* the epoch number read on entry */
byte wq[NW];            /* block or sector it is at */
byte wc[2*NW];          /* the copy of a frozen block that it is making */
#define W_IDLE   0
#define W_ACT    1
#define W_LOGHOT 2
#define W_ENTER  3
#define W_MARK   4
#define W_PRES   5
#define W_C0     6
#define W_C1     7
#define W_CAS    8
#define W_WRITE  9
#define W_LEAVE  10
#define W_DONE   11
#define W_PINLATE 12
#define W_SETHOT 13

byte spc;               /* shipper: step */
byte sb;                /* block it is at */
byte sbuf[2];
byte cutn; byte gun; byte killn; byte cooln; byte pown;
#define S_IDLE   0
#define S_CUT2   1
#define S_DRAIN  2
#define S_NEXT   3
#define S_R0     4
#define S_R1     5
#define S_CAS    6
#define S_COMMIT 7
#define S_ACK    8
#define S_SB     9
#define S_SE     10
#define S_FORGET 11
#define S_GIVE   12
#define S_PASS   13
#define S_END    14
#define S_START  15
bit again;              /* the read is one of a lost part (T4) */
bit live;               /* the read is one of a live pass */
#ifdef M_T1_PER_DISK
byte Ed[2] = 1;         /* mutation: an epoch number for each disk */
#endif

byte cpc;               /* cooler: step */
byte cr;                /* region */
byte ca;                /* number of the activation it ends */
#define C_IDLE 0
#define C_WAIT 1
#define C_SB   2
#define C_SE   3
#define C_P1   4
#define C_P2   5
#define C_LOG  6

/* ---- observers ----------------------------------------------------------- */
byte issued;            /* writes issued, acknowledged: bit masks */
byte acked;
byte ackm[MAXOPS];      /* writes acknowledged when this one was issued */
byte who[NS*MAXV];      /* who[q*MAXV + v-1] - 1: the write that made version v of q */
#ifdef M_S1_ORPHAN
byte orph; byte orpho;  /* a write that the dead daemon left in the kernel: sector + 1, write */
#endif
bit  lost;              /* a power cut has been */
bit  stall;             /* shipper, vault and cooler stand still for ever */
#ifdef STALL
#define RUN (!stall)
#else
#define RUN true
#endif

#define DIFF(b) (disk[2*(b)] != vault[2*(b)] || disk[2*(b)+1] != vault[2*(b)+1])
#if K == 1
#define DIFFS (DIFF(0)*1 + DIFF(1)*2)
#else
#define DIFFS (DIFF(0)*1 + DIFF(1)*2 + DIFF(2)*4 + DIFF(3)*8)
#endif
#if NM == 3
#define MARKED  (mk[0] | mk[1] | mk[2] | pend)
#define DURABLE (dm[0] | dm[1] | dm[2] | dpend)
#else
#define MARKED  (mk[0] | mk[1] | pend)
#define DURABLE (dm[0] | dm[1] | dpend)
#endif
#define HOTS ((dhot[0] -> DMASK(0) : 0) | (dhot[1] -> DMASK(1) : 0))
#if NW == 2
#define ALLDONE (wpc[0] == W_DONE && wpc[1] == W_DONE)
#define NOBODY_INSIDE (wpc[0] != W_MARK && wpc[1] != W_MARK)
#else
#define ALLDONE (wpc[0] == W_DONE && wpc[1] == W_DONE && wpc[2] == W_DONE)
#define NOBODY_INSIDE (wpc[0] != W_MARK && wpc[1] != W_MARK && wpc[2] != W_MARK)
#endif

/*
 * T2: a map is reused only when every writer that could still refer to it has
 * left: its own, and those of the next epoch that preserve for it.
 * Three maps: the map of E+1 last served E-2; its own writers and those of E-1
 * have left. Where E-1 was delivered that is so already; where it gave up its
 * cut, this is the drain of the given-up epoch.
 * Two maps: the map of E+1 last served E-1; so the writers of E must have left,
 * and E is the current epoch.
 */
#if defined(M_T2_REUSE)
#define REUSE_OK true
#elif NM == 3
#define REUSE_OK (infl[M(NEXT(E))] == 0 && infl[M(PREV(E))] == 0)
#else
#define REUSE_OK (infl[0] == 0 && infl[1] == 0)
#endif

byte i, j, v, t;        /* scratch of d_steps, always left at 0 */

/*
 * P1: a point is a consistent prefix. If a write is visible in it, every write
 * acknowledged before that one was issued is in it, or overwritten there.
 */
inline check_point()
{
  i = 0;
  do                                                    /* sector i shows write x */
  :: i < NS && vault[i] == 0 -> i++
  :: i < NS && vault[i] != 0 ->
     t = ackm[who[i*MAXV + vault[i] - 1] - 1];          /* acknowledged before x was issued */
     j = 0;
     do
     :: j < NS*MAXV ->
        if
        :: who[j] != 0 && (t & BIT(who[j] - 1)) && vault[j / MAXV] < j % MAXV + 1 ->
           printf("P1 VIOLATED: sector %d of the point shows write %d; write %d (sector %d, version %d) came before it and is missing\n",
                  i, who[i*MAXV + vault[i] - 1] - 1, who[j] - 1, j / MAXV, j % MAXV + 1);
           assert(false)
        :: else
        fi;
        j++
     :: else -> break
     od;
     i++
  :: else -> break
  od;
  i = 0; j = 0; t = 0
}

inline write_sector(w, q)
{
#ifndef LIVE
  disk[q] = disk[q] + 1;
  assert(disk[q] <= MAXV);
  who[q*MAXV + disk[q] - 1] = OP(w) + 1;
  printf("W%d   write %d: sector %d := version %d\n", w, OP(w), q, disk[q]);
#endif
  dirty = dirty | BIT(BLK(q));
  syn[0] = syn[0] & ~BIT(BLK(q));
  syn[1] = syn[1] & ~BIT(BLK(q))
}

inline mark_blocks(w)
{
  i = BLK(Q0(OP(w)));
  do
  :: i <= BLK(Q1(OP(w))) -> mk[M(we[w])] = mk[M(we[w])] | BIT(i); i++
  :: else -> break
  od;
  i = 0
}

/* A sync that has ended makes durable what was not written again meanwhile. */
inline sync_ends(s)
{
#if MAXPOWER > 0
  do
  :: i < NS -> if :: syn[s] & BIT(BLK(i)) -> sdisk[i] = disk[i] :: else fi; i++
  :: else -> break
  od;
  i = 0;
#endif
  dirty = dirty & ~syn[s]; syn[s] = 0
}

#ifdef M_T1_PER_DISK
#define EPOCH_FOR(w) Ed[REG(w)]
#else
#define EPOCH_FOR(w) E
#endif

proctype Writer(byte w)
{
  do
  /* The guest issues the write. */
#ifdef M_T6_PIN_LATE
  :: d_step { wpc[w] == W_IDLE ->                       /* looks first, pins later */
       if :: !(issued & BIT(OP(w))) -> ackm[OP(w)] = acked; issued = issued | BIT(OP(w)) :: else fi;
       wpc[w] = (hot[REG(w)] -> W_PINLATE : W_ACT);
       if :: wpc[w] == W_ACT -> pin[REG(w)]++ :: else fi }
  :: d_step { wpc[w] == W_PINLATE -> pin[REG(w)]++; wpc[w] = W_ENTER }
#else
  :: d_step { wpc[w] == W_IDLE ->
#ifndef LIVE
       if :: !(issued & BIT(OP(w))) -> ackm[OP(w)] = acked; issued = issued | BIT(OP(w)) :: else fi;
#endif
       printf("W%d issues write %d (sectors %d..%d), pins region %d\n", w, OP(w), Q0(OP(w)), Q1(OP(w)), REG(w));
       pin[REG(w)]++;                                   /* step 1: pin, then look */
#if MAXCOOL == 0
       wpc[w] = W_ENTER }
#else
       wpc[w] = W_ACT }
#endif
#endif
  /* Step 1: activate. A cold region is made hot, durably, by one of its writers. */
  :: d_step { wpc[w] == W_ACT && hot[REG(w)] -> wpc[w] = W_ENTER }
  :: d_step { wpc[w] == W_ACT && !hot[REG(w)] && !acting[REG(w)] ->
       acting[REG(w)] = 1; wpc[w] = W_LOGHOT }
  :: d_step { wpc[w] == W_LOGHOT ->                     /* the durable record, then the bit */
       dact[REG(w)]++; dhot[REG(w)] = 1; wpc[w] = W_SETHOT;
       printf("W%d logs region %d hot, activation %d\n", w, REG(w), dact[REG(w)]) }
  :: d_step { wpc[w] == W_SETHOT -> hot[REG(w)] = 1; acting[REG(w)] = 0; wpc[w] = W_ENTER }

  /* Step 2: enter and mark, one section against the cut (T1). */
#if defined(M_T1_READ_GAP) || defined(M_T1_STORE_WAITS) /* reads e; later counts in and marks */
  :: d_step { wpc[w] == W_ENTER -> we[w] = E; wpc[w] = W_MARK; printf("W%d reads epoch %d\n", w, E) }
  :: d_step { wpc[w] == W_MARK ->
       infl[M(we[w])]++; mark_blocks(w); wq[w] = BLK(Q0(OP(w))); wpc[w] = W_PRES;
       printf("W%d counts in to epoch %d and marks\n", w, we[w]) }
#elif defined(M_T1_MARK_GAP)                            /* reads e and counts in; later marks */
  :: d_step { wpc[w] == W_ENTER -> we[w] = E; infl[M(we[w])]++; wpc[w] = W_MARK; printf("W%d enters epoch %d\n", w, E) }
  :: d_step { wpc[w] == W_MARK ->
       mark_blocks(w); wq[w] = BLK(Q0(OP(w))); wpc[w] = W_PRES; printf("W%d marks in epoch %d\n", w, we[w]) }
#else
  :: d_step { wpc[w] == W_ENTER ->
       we[w] = EPOCH_FOR(w);
       infl[M(we[w])]++;
       mark_blocks(w);
       wq[w] = BLK(Q0(OP(w)));
       wpc[w] = W_PRES;
       printf("W%d enters epoch %d and marks\n", w, we[w]) }
#endif

  /* Step 3: preserve for e-1, by the number read on entry (T1, T3). */
  :: d_step { wpc[w] == W_PRES && wq[w] > BLK(Q1(OP(w))) -> wq[w] = Q0(OP(w)); wpc[w] = W_WRITE }
#ifdef M_P3_WAIT
  :: d_step { wpc[w] == W_PRES && wq[w] <= BLK(Q1(OP(w))) && !FROZEN(M(PREV(we[w])), wq[w]) ->
#else
  :: d_step { wpc[w] == W_PRES && wq[w] <= BLK(Q1(OP(w))) ->
#endif
       if
#ifdef M_P3_WAIT                                        /* waits for the shipper to read the block */
       :: FROZEN(M(PREV(we[w])), wq[w]) -> skip
#else
       :: FROZEN(M(PREV(we[w])), wq[w]) && !(gaveup && we[w] == E) -> wpc[w] = W_C0
#endif
       :: else -> wq[w] = wq[w] + 1
       fi }
#if MAXGIVEUP > 0
  /* T5: the writer finds the limit passed. The epoch gives up its cut; the
   * word is given before the write, and the shipper asks after its last read. */
  :: d_step { wpc[w] == W_PRES && wq[w] <= BLK(Q1(OP(w))) && FROZEN(M(PREV(we[w])), wq[w]) && fz && we[w] == E && !gaveup && !vcom && gun < MAXGIVEUP ->
       gaveup = 1; gun++; wq[w] = wq[w] + 1; printf("W%d makes epoch %d give up its cut\n", w, F) }
#endif
  :: d_step { wpc[w] == W_C0 -> wc[2*w] = disk[2*wq[w]]; wpc[w] = W_C1 }
  :: d_step { wpc[w] == W_C1 -> wc[2*w+1] = disk[2*wq[w]+1];
       printf("W%d has copied block %d (%d,%d)\n", w, wq[w], wc[2*w], wc[2*w+1]);
#ifdef M_T3_ONE_SLOT                                    /* every writer copies to the block's one slot */
       pcopy[2*wq[w]] = wc[2*w]; pcopy[2*wq[w]+1] = wc[2*w+1];
#endif
#ifdef M_T3_WRITE_FIRST                                 /* data first, frozen -> preserved later */
       wq[w] = Q0(OP(w)); wpc[w] = W_WRITE }
#else
       wpc[w] = W_CAS }
#endif
  :: d_step { wpc[w] == W_CAS ->                        /* the first wins, a loser drops its copy */
#ifdef M_T3_WRITE_FIRST
       wq[w] = BLK(Q0(OP(w)));
#endif
       if
       :: FROZEN(M(PREV(we[w])), wq[w]) ->
          pr[M(PREV(we[w]))] = pr[M(PREV(we[w]))] | BIT(wq[w]);
#ifndef M_T3_ONE_SLOT
          pcopy[2*wq[w]] = wc[2*w]; pcopy[2*wq[w]+1] = wc[2*w+1];
#endif
          printf("W%d preserved block %d for epoch %d\n", w, wq[w], PREV(we[w]))
       :: else -> printf("W%d drops its copy of block %d\n", w, wq[w])
       fi;
       wc[2*w] = 0; wc[2*w+1] = 0;
#ifdef M_T3_WRITE_FIRST
       wpc[w] = W_LEAVE }
#else
       wq[w] = wq[w] + 1; wpc[w] = W_PRES }
#endif

  /* Step 4: write, sector by sector. */
  :: d_step { wpc[w] == W_WRITE ->
       write_sector(w, wq[w]);
       if
       :: wq[w] == Q1(OP(w)) ->
#ifdef M_T3_WRITE_FIRST
          wpc[w] = (FROZEN(M(PREV(we[w])), BLK(Q0(OP(w)))) -> W_CAS : W_LEAVE)
#else
          wpc[w] = W_LEAVE
#endif
       :: else -> wq[w] = wq[w] + 1
       fi }

  /* Step 5: leave, unpin, reply. */
  :: d_step { wpc[w] == W_LEAVE ->
       infl[M(we[w])]--; pin[REG(w)]--;
       we[w] = 0; wq[w] = 0;
#ifdef LIVE
       wpc[w] = W_IDLE }
#else
       acked = acked | BIT(OP(w));
       printf("W%d leaves; write %d is acknowledged\n", w, OP(w));
       wn[w]++;
       wpc[w] = (wn[w] == NOPS(w) -> W_DONE : W_IDLE) }
#endif
  :: wpc[w] == W_DONE -> break
  od
}

/* The blocks that the frozen epoch must still make a part of. */
#define TOSHIP (mk[M(F)] | pend)

#ifdef M_T5_NOT_ASKED   /* the shipper need not see a give-up that comes while it reads */
#define STOPPED false
#else
#define STOPPED gaveup
#endif

proctype Shipper()
{
  do
  /* T1: the cut is one store. Blocks of given-up epochs that have no part go
   * into the map first. */
  :: d_step { RUN && spc == S_IDLE && !fz && (cutn < MAXCUT || ALLDONE) && (mk[M(E)] | pend) != 0 && REUSE_OK ->
       i = 0;
       do
       :: i < NB ->
          if
          :: (pend & BIT(i)) && part[i] == 0 -> mk[M(E)] = mk[M(E)] | BIT(i)
          :: else
          fi;
          if :: mk[M(E)] & BIT(i) -> part[i] = 0 :: else fi;    /* a later part wins */
          i++
       :: else -> break
       od;
       i = 0;
#ifndef LIVE
       if :: !ALLDONE -> cutn++ :: else fi;
#endif
       fz = 1; vcom = 0; gaveup = 0;
       printf("SHIP cut: epoch %d is frozen, blocks %d\n", E, mk[M(E)]);
#ifdef M_T1_PER_DISK
       Ed[0] = NEXT(E); spc = S_CUT2 }
  :: d_step { RUN && spc == S_CUT2 -> Ed[1] = NEXT(E); E = NEXT(E); spc = S_DRAIN }
#else
       E = NEXT(E); spc = S_DRAIN }
#endif
  /* T2: a frozen epoch is read only when its writers have all left. */
#if defined(M_T1_STORE_WAITS)           /* the store first, then the wait for writers inside step 2 */
  :: d_step { RUN && spc == S_DRAIN && infl[M(F)] == 0 && NOBODY_INSIDE -> spc = S_NEXT; printf("SHIP epoch %d is drained\n", F) }
#elif defined(M_T2_NO_DRAIN)
  :: d_step { RUN && spc == S_DRAIN -> spc = S_NEXT }
#else
  :: d_step { RUN && spc == S_DRAIN && infl[M(F)] == 0 -> spc = S_NEXT; printf("SHIP epoch %d is drained\n", F) }
#endif
  :: d_step { RUN && spc == S_NEXT && !STOPPED ->
       do
       :: sb < NB && (TOSHIP & BIT(sb)) && part[sb] == 0 -> break
       :: sb < NB && !((TOSHIP & BIT(sb)) && part[sb] == 0) -> sb++
       :: else -> break
       od;
       if
       :: sb == NB -> sb = 0; spc = S_COMMIT
       :: sb < NB && FROZEN(M(F), sb) ->
#ifdef M_T3_CAS_FIRST                   /* frozen -> read, and reads later */
          rd[M(F)] = rd[M(F)] | BIT(sb);
#endif
          spc = S_R0
       :: sb < NB && (pr[M(F)] & BIT(sb)) ->
          pc[2*sb] = pcopy[2*sb]; pc[2*sb+1] = pcopy[2*sb+1]; part[sb] = 1;
          printf("SHIP takes the preserved copy of block %d (%d,%d)\n", sb, pc[2*sb], pc[2*sb+1]);
          sb = 0
       :: else ->                       /* T4: it was read, and its part is lost */
#ifdef M_T4_ASK_FIRST                   /* asks for the mark, and reads later */
          if :: mk[M(E)] & BIT(sb) -> gaveup = 1; sb = 0 :: else -> again = 1; spc = S_R0 fi
#else
          again = 1; spc = S_R0
#endif
       fi }
  /* T3: the shipper reads, then frozen -> read; if that fails it takes the copy. */
  :: d_step { RUN && spc == S_R0 -> sbuf[0] = disk[2*sb]; spc = S_R1 }
  :: d_step { RUN && spc == S_R1 -> sbuf[1] = disk[2*sb+1]; spc = S_CAS;
       printf("SHIP has read block %d (%d,%d)\n", sb, sbuf[0], sbuf[1]) }
  :: d_step { RUN && spc == S_CAS ->
       if
       :: again ->                      /* T4: asked after the read */
#if defined(M_T4_LIVE) || defined(M_T4_ASK_FIRST)
          if :: true ->
#else
          if
          :: mk[M(E)] & BIT(sb) -> gaveup = 1; printf("SHIP block %d is lost: epoch %d gives up its cut\n", sb, F)
          :: else ->
#endif
             pc[2*sb] = sbuf[0]; pc[2*sb+1] = sbuf[1]; part[sb] = 1;
             printf("SHIP makes the part of block %d again\n", sb)
          fi
       :: !again && live -> pc[2*sb] = sbuf[0]; pc[2*sb+1] = sbuf[1]; part[sb] = 1
       :: !again && !live ->
          if
#if defined(M_T3_NO_CAS) || defined(M_T3_CAS_FIRST)     /* believes its read */
          :: true -> rd[M(F)] = rd[M(F)] | BIT(sb);
#else
          :: (pr[M(F)] & BIT(sb)) ->
             pc[2*sb] = pcopy[2*sb]; pc[2*sb+1] = pcopy[2*sb+1]; part[sb] = 1;
             printf("SHIP was late: takes the preserved copy of block %d (%d,%d)\n", sb, pc[2*sb], pc[2*sb+1])
          :: else -> rd[M(F)] = rd[M(F)] | BIT(sb);
#endif
             pc[2*sb] = sbuf[0]; pc[2*sb+1] = sbuf[1]; part[sb] = 1
          fi
       fi;
       spc = (live -> S_PASS : S_NEXT);
       again = 0; live = 0; sb = 0; sbuf[0] = 0; sbuf[1] = 0 }

  /* Commit: every part durable, and the cut not given up, asked after the last read. */
  :: d_step { RUN && spc == S_COMMIT && !STOPPED ->
       do
       :: i < NB && (TOSHIP & BIT(i)) && part[i] == 1 -> t = 1; i++      /* wait */
       :: i < NB && !((TOSHIP & BIT(i)) && part[i] == 1) -> i++
       :: else -> break
       od;
       i = 0;
       if
       :: t -> skip
       :: else ->
          do
          :: i < NS ->
             if :: TOSHIP & BIT(BLK(i)) -> vault[i] = pc[i] :: else fi;
             i++
          :: else -> break
          od;
          i = 0; vcom = 1; spc = S_ACK;
          printf("VAULT commits epoch %d\n", F);
#ifndef LIVE
          if :: !lost -> check_point() :: else fi
#endif
       fi;
       t = 0 }
  :: d_step { RUN && spc == S_ACK ->
#if defined(M_T6_FORGET_NO_SYNC) || defined(M_T6_NO_SYNC) || (MAXCOOL == 0 && MAXPOWER == 0)
       spc = S_FORGET }
#else
       spc = S_SB }
#endif
  /* T6: a sync of the disk files that began after the last write of the epoch. */
  :: d_step { RUN && spc == S_SB -> syn[0] = dirty; spc = S_SE }
  :: d_step { RUN && spc == S_SE -> sync_ends(0); spc = S_FORGET }
  :: d_step { RUN && spc == S_FORGET ->
       mk[M(F)] = 0; rd[M(F)] = 0; pr[M(F)] = 0; dm[M(F)] = 0; pend = 0; dpend = 0; fz = 0; vcom = 0;
       do
       :: i < NS -> pc[i] = 0; pcopy[i] = 0; part[i/2] = 0; i++
       :: else -> break
       od;
       i = 0; spc = S_IDLE; printf("SHIP forgets epoch %d\n", F) }

  /* T4/T5: the epoch gives up its cut. Its blocks stay its own, in memory and
   * in its HRL, until the epoch that takes them is acknowledged. */
#if MAXGIVEUP > 0
  :: d_step { RUN && fz && !gaveup && !vcom && gun < MAXGIVEUP && spc >= S_DRAIN && spc <= S_COMMIT ->
       gaveup = 1; gun++; printf("SHIP makes epoch %d give up its cut\n", F) }
#endif
#if MAXGIVEUP > 0 || MAXKILL > 0
  :: d_step { RUN && fz && gaveup && (spc == S_DRAIN || spc == S_NEXT || spc == S_COMMIT) ->
       pend = pend | mk[M(F)];
#ifndef M_GIVEUP_DROP_HRL
       dpend = dpend | dm[M(F)];
#endif
       dm[M(F)] = 0; mk[M(F)] = 0; rd[M(F)] = 0; pr[M(F)] = 0;
       do
       :: i < NS -> pcopy[i] = 0; if :: part[i/2] == 1 -> part[i/2] = 0 :: else fi; i++
       :: else -> break
       od;
       i = 0; fz = 0; gaveup = 0; sb = 0; again = 0; spc = S_PASS; printf("SHIP gives up the cut of epoch %d\n", F) }
  :: d_step { RUN && spc == S_PASS -> spc = S_IDLE }
  /* A live pass over the blocks of the given-up epoch, after its writers have
   * left; what is written meanwhile is marked in the current epoch. */
#ifdef M_PASS_NO_DRAIN
  :: d_step { RUN && spc == S_PASS ->
#else
  :: d_step { RUN && spc == S_PASS && infl[M(F)] == 0 && infl[M(PREV(F))] == 0 ->
#endif
       do
       :: sb < NB && (pend & BIT(sb)) && part[sb] == 0 -> break
       :: sb < NB && !((pend & BIT(sb)) && part[sb] == 0) -> sb++
       :: else -> break
       od;
       if
       :: sb == NB -> sb = 0; spc = S_IDLE
       :: else -> live = 1; spc = S_R0
       fi }
#endif

  /* After a restart: ask the vault for its head first. */
  :: d_step { RUN && spc == S_START && fz && vcom -> spc = S_ACK }
  :: d_step { RUN && spc == S_START && fz && !vcom -> spc = S_DRAIN }
  :: d_step { RUN && spc == S_START && !fz -> spc = S_IDLE }

  /* P2: when everything is quiet and one more epoch delivered, vault == disk. */
  :: d_step { spc == S_IDLE && ALLDONE && !fz && (mk[M(E)] | pend) == 0 ->
       spc = S_END; assert(DIFFS == 0) }
  :: spc == S_END -> break
  od
}

proctype Vault()
{
end:
  do
  :: d_step { RUN && part[0] == 1 -> part[0] = 2 }
  :: d_step { RUN && part[1] == 1 -> part[1] = 2 }
#if K == 2
  :: d_step { RUN && part[2] == 1 -> part[2] = 2 }
  :: d_step { RUN && part[3] == 1 -> part[3] = 2 }
#endif
  od
}

/*
 * T6: clear the bit, wait for the writers that saw it, make durable, then log
 * "cold" with the activation's number, so that a newer activation voids it.
 */
#if MAXCOOL > 0
inline cool(r) { hot[r] = 0; cr = r; ca = dact[r]; cooln++; cpc = C_WAIT; printf("COOL clears the bit of region %d\n", r) }

proctype Cooler()
{
end:
  do
  :: d_step { RUN && cpc == C_IDLE && cooln < MAXCOOL && hot[0] -> cool(0) }
  :: d_step { RUN && cpc == C_IDLE && cooln < MAXCOOL && hot[1] -> cool(1) }
#ifdef M_T6_NO_WAIT
  :: d_step { RUN && cpc == C_WAIT -> cpc = C_SB }
#else
  :: d_step { RUN && cpc == C_WAIT && pin[cr] == 0 -> cpc = C_SB }
#endif
#if defined(M_T6_COOL_NO_SYNC) || defined(M_T6_NO_SYNC)
  :: d_step { RUN && cpc == C_SB -> cpc = C_P1 }
#else
  :: d_step { RUN && cpc == C_SB -> syn[1] = dirty & DMASK(cr); cpc = C_SE }
#endif
  :: d_step { RUN && cpc == C_SE -> sync_ends(1); cpc = C_P1; printf("COOL synced disk %d\n", cr) }
  /* The maps that cover the region: the current one first, then the frozen one
   * and those of given-up epochs, so that a cut in between loses neither. */
#if defined(M_T6_NO_MAPS)
  :: d_step { RUN && cpc == C_P1 -> cpc = C_LOG }
#elif defined(M_T6_MAPS_ORDER)
  :: d_step { RUN && cpc == C_P1 ->
       if :: fz -> dm[M(F)] = dm[M(F)] | (mk[M(F)] & DMASK(cr)) :: else fi;
       dpend = dpend | (pend & DMASK(cr)); cpc = C_P2 }
  :: d_step { RUN && cpc == C_P2 -> dm[M(E)] = dm[M(E)] | (mk[M(E)] & DMASK(cr)); cpc = C_LOG }
#else
  :: d_step { RUN && cpc == C_P1 -> dm[M(E)] = dm[M(E)] | (mk[M(E)] & DMASK(cr)); cpc = C_P2 }
  :: d_step { RUN && cpc == C_P2 ->
       if :: fz -> dm[M(F)] = dm[M(F)] | (mk[M(F)] & DMASK(cr)) :: else fi;
       dpend = dpend | (pend & DMASK(cr)); cpc = C_LOG }
#endif
  :: d_step { RUN && cpc == C_LOG ->
#ifdef M_T6_NO_NUMBER
       dhot[cr] = 0; printf("COOL logs region %d cold\n", cr);
#else
       if :: dact[cr] == ca -> dhot[cr] = 0; printf("COOL logs region %d cold, activation %d\n", cr, ca)
          :: else -> printf("COOL cold %d is void: activation %d is newer\n", ca, dact[cr]) fi;
#endif
       cpc = C_IDLE; cr = 0; ca = 0 }
  od
}
#endif

/* Kills, power cuts, and a shipper that stands still. */
#if MAXKILL > 0 || MAXPOWER > 0 || defined(STALL)
inline process_gone()
{
  do
  :: i < NW ->
#ifdef M_S1_ORPHAN
     if :: wpc[i] == W_WRITE && orph == 0 -> orph = wq[i] + 1; orpho = OP(i) :: else fi;
#endif
     if :: wpc[i] != W_DONE -> wpc[i] = W_IDLE :: else fi;      /* asked for again: a new write of the current epoch */
     we[i] = 0; wq[i] = 0; wc[2*i] = 0; wc[2*i+1] = 0; i++
  :: else -> break
  od;
  i = 0;
  do :: i < NM -> infl[i] = 0; i++ :: else -> break od;
  i = 0;
  do :: i < NB -> if :: part[i] == 1 -> part[i] = 0 :: else fi; i++ :: else -> break od;
  i = 0;
  pin[0] = 0; pin[1] = 0; acting[0] = 0; acting[1] = 0; syn[0] = 0; syn[1] = 0;
  cpc = 0; cr = 0; ca = 0;
  sb = 0; sbuf[0] = 0; sbuf[1] = 0; again = 0; live = 0;
  if :: spc != S_END -> spc = S_START :: else fi
}

proctype Fate()
{
end:
  do
#if MAXKILL > 0
  :: d_step { killn < MAXKILL && !ALLDONE && !lost -> killn++; printf("KILL\n"); process_gone() }
#endif
#ifdef M_S1_ORPHAN                      /* S1 broken: it lands while the successor serves */
  :: d_step { orph != 0 && disk[orph-1] < MAXV - 1 ->
       v = orph - 1; disk[v] = disk[v] + 1; who[v*MAXV + disk[v] - 1] = orpho + 1;
       dirty = dirty | BIT(BLK(v)); printf("ORPHAN lands: write %d, sector %d := version %d\n", orpho, v, disk[v]);
       v = 0; orph = 0; orpho = 0 }
#endif
#ifdef STALL
  :: d_step { !stall && !ALLDONE -> stall = 1; printf("STALL\n") }
  /* P3: nothing moves any more, and the writers are all done. */
  :: d_step { stall && timeout -> assert(ALLDONE); stall = 0 }
#endif
#if MAXPOWER > 0
  :: atomic { pown < MAXPOWER && spc != S_END ->
       pown++; v = 0;
       do                               /* each unsynced sector is lost or kept */
       :: v < NS && disk[v] != sdisk[v] -> disk[v] = sdisk[v]; v++
       :: v < NS -> v++
       :: v == NS -> break
       od;
       d_step {
         v = 0; lost = 1; printf("POWER CUT\n");
         process_gone();
         do :: i < NW -> wpc[i] = W_DONE; i++ :: else -> break od; i = 0;
         /* changed = every durable map not forgotten, and every block of every
          * hot region. The unfinished epoch is abandoned. */
         pend = DURABLE | HOTS; dpend = DURABLE;
         do :: i < NM -> mk[i] = 0; rd[i] = 0; pr[i] = 0; dm[i] = 0; i++ :: else -> break od; i = 0;
         do :: i < NS -> pc[i] = 0; pcopy[i] = 0; part[i/2] = 0; sdisk[i] = disk[i]; i++ :: else -> break od; i = 0;
         fz = 0; vcom = 0; gaveup = 0; dirty = 0; hot[0] = dhot[0]; hot[1] = dhot[1];
         spc = S_IDLE } }
#endif
  od
}
#endif

/*
 * P2, as invariants of every state:
 *   P2a  a block in which disk and vault differ is marked (what a kill leaves);
 *   P2b  a block in which disk and vault differ, or could differ because a power
 *        cut takes an unsynced write back, is in a durable map or a hot region.
 */
#define P2A ((DIFFS & ~MARKED) == 0)
#define P2B (((DIFFS | dirty) & ~(DURABLE | HOTS)) == 0)

#ifndef LIVE
proctype Monitor()
{
end:
  do
  :: d_step { !P2A -> printf("P2a VIOLATED: differing blocks %d, marked %d\n", DIFFS, MARKED); assert(false) }
#if MAXCOOL > 0 && !defined(NO_P2B)
  :: d_step { !P2B -> printf("P2b VIOLATED: differing %d, dirty %d, durable maps %d, hot regions %d\n", DIFFS, dirty, DURABLE, HOTS); assert(false) }
#endif
  od
}
#endif

init
{
  atomic {
#ifndef LIVE
    run Monitor();
#endif
    run Vault();
#if MAXCOOL > 0
    run Cooler();
#endif
#if MAXKILL > 0 || MAXPOWER > 0 || defined(STALL)
    run Fate();
#endif
    run Shipper();
    run Writer(0); run Writer(1);
#if NW == 3
    run Writer(2)
#endif
  }
}

#ifdef LIVE
/* Guests write for ever. Cuts go on; with QUIET, unless the writers pause. */
#ifdef QUIET
ltl cuts { ([] <> (spc == S_DRAIN)) || ([] <> (spc == S_IDLE && infl[M(E)] == 0)) }
#else
ltl cuts { [] <> (spc == S_DRAIN) }
#endif
#endif
