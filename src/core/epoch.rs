//! The replication of one VM as a state machine: events in, one step, actions out. Pure.
//!
//! ```text
//!             +------------- resumed, tried again, probe answered ---------------+
//!             v                                                                  |
//!         Recovering --- nothing frozen ---> Idle --- due, sync ---> Surveying   |
//!          |     |                            ^  ^                   |  |  |  |  |
//!   frozen |     | head is the frozen one     |  +-- Renewing <------+  |  |  |  |
//!          |     |                            |      no changes         |  |  |  |
//!          |     |                            |  HeldBack <-------------+  |  |  |
//!          |     |                            |  vault behind in applying  |  |  |
//!          |     |          much pending      |                            |  |  |
//!          |     |     +----------------------|----------------------------+  |  |
//!          |     |     v                      |                               |  |
//!          |     |  LiveDraining -> LivePass -|-> Surveying, again            |  |
//!          |     |     ^    ^                 |                               |  |
//!          |     |     |    +--- LiveCutting <|-- still much, and shrinking --+  |
//!          |     |  GivingUp                  |                               |  |
//!          |     |     ^ T4, T5               |                        Cutting|  |
//!          v     |     |                      |                           |<--+  |
//!         Draining --> Shipping --> Committing --> Acknowledging          |      |
//!             ^          |              ^                                 |      |
//!             +----------|--------------|---------------------------------+      |
//!                        +-- any failed: Retrying, Stopped; paused: Paused ------+
//! ```
//!
//! Every way back into the work leads through Recovering, which asks the vault for its head
//! first: a lost reply, a kill, a restored vault and a plain retry are one case.
//!
//! A busy state has exactly one action under way, and its result is the next event but for those
//! that come from people. Pausing lets a commit and its acknowledgement end, and stops all else.

use std::time::Duration;

use crate::core::health::GIVE_UPS_ALERT;
use crate::core::retry::{Due, Retry};
use crate::core::schedule::Schedule;

/// Pending blocks that need no pass of their own: the cut takes them, in bytes of disk.
pub const PASS_BYTES_MIN: u64 = 64 << 20;
/// Live passes of one epoch before the final cut, at most.
pub const PASSES_MAX: u32 = 8;
/// What can be shipped within this time needs no further pass.
const PASS_SECONDS: u64 = 5;
/// How often a vault that is behind in applying is asked again.
const HELD_BACK_STEP: Duration = Duration::from_secs(1);
/// Refused commits in a row that lead to another look at the head; then it is a failure.
const CHAIN_BREAKS_MAX: u32 = 3;

/// Identifies a waiting `sync`.
pub type SyncId = u64;

/// What the replication of a VM is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Before the first event.
    New,
    /// The vault is asked for its head.
    Recovering,
    /// Nothing to do before the next cycle.
    Idle,
    /// A cycle begins, or goes on after a pass: what is there to send?
    Surveying,
    /// The vault is told that nothing changed.
    Renewing,
    /// The vault is behind in applying.
    HeldBack,
    /// A live cut between passes.
    LiveCutting,
    /// Waiting for the writers of the epoch that gave up its cut (T2, T4).
    LiveDraining,
    /// Pending blocks are sent from the live disks.
    LivePass,
    /// The final cut.
    Cutting,
    /// Waiting for the writers of the frozen epoch (T2).
    Draining,
    /// The frozen epoch is sent.
    Shipping,
    /// Its manifest is committed.
    Committing,
    /// It is acknowledged to the tracker.
    Acknowledging,
    /// The epoch gives up its cut (T4, T5).
    GivingUp,
    /// A failure is waited out.
    Retrying,
    /// Waiting, and a probe is under way.
    Probing,
    /// Paused by the operator.
    Paused,
    /// A failure that is not tried again by itself.
    Stopped,
}

/// What was found at the vault and the tracker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// No epoch is frozen.
    NothingFrozen,
    /// An epoch is frozen and not in the vault.
    Frozen,
    /// The frozen epoch is the vault's head: its acknowledgement was lost.
    Committed,
}

/// What a cycle would send.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Survey {
    /// A cut would make an epoch.
    pub has_changes: bool,
    /// Bytes of pending blocks without a part, holes counted.
    pub unmade_bytes: u64,
    /// Bytes marked in the current epoch.
    pub marked_bytes: u64,
    /// The vault is too far behind in applying.
    pub is_held_back: bool,
}

/// What has happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// The shipper started.
    Started,
    /// Some time passed: [`Machine::wake_at`], or earlier.
    TimePassed,
    /// A person wants a cut to be durable; answered at the latest at `deadline`.
    SyncAsked {
        /// For the answer.
        id: SyncId,
        /// Nobody waits after this time.
        deadline: Duration,
    },
    /// A cycle is wanted now.
    KickAsked,
    /// The operator pauses.
    PauseAsked,
    /// The operator resumes.
    ResumeAsked,
    /// Another interval.
    IntervalSet(Duration),
    /// The head is known and the chain is sound.
    Recovered(Found),
    /// A survey ended.
    Surveyed(Survey),
    /// The vault knows that nothing changed.
    Renewed,
    /// A cut was made.
    CutMade,
    /// Whether all writers have left.
    Drained(bool),
    /// A live pass ended.
    PassShipped {
        /// Bytes a second, over the pass.
        bytes_per_second: u64,
    },
    /// Every block of the frozen epoch has a durable part.
    FrozenShipped,
    /// A transfer ended early, to look at what people asked for.
    Interrupted,
    /// The frozen epoch has given up its cut (T4, T5).
    GaveUp,
    /// Its blocks are pending now.
    GivenUp,
    /// The manifest is the vault's head.
    Committed,
    /// The tracker has forgotten the epoch.
    Acknowledged,
    /// The vault refuses the parent.
    ChainBroken,
    /// An action failed.
    Failed {
        /// Trying again later makes sense.
        is_recoverable: bool,
        /// Something became durable since the last failure.
        has_progressed: bool,
    },
    /// A probe ended.
    Probed(bool),
}

/// Why a `sync` is not answered with an epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// The epoch that was just acknowledged has it.
    Durable,
    /// Nothing had changed.
    NoChanges,
    /// The last failure is the answer.
    Failed,
    /// Replication is paused.
    Paused,
}

/// What is to be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Ask the vault for its head and make the chain sound: [`Event::Recovered`].
    Recover,
    /// [`Event::Surveyed`].
    Survey,
    /// [`Event::Renewed`].
    Renew,
    /// Cut live: [`Event::CutMade`].
    CutLive,
    /// Cut with every pending block that has no part: [`Event::CutMade`].
    CutFinal,
    /// [`Event::Drained`].
    Drain,
    /// [`Event::PassShipped`] or [`Event::Interrupted`].
    ShipLive,
    /// [`Event::FrozenShipped`], [`Event::GaveUp`] or [`Event::Interrupted`].
    ShipFrozen,
    /// [`Event::Committed`], [`Event::GaveUp`] or [`Event::ChainBroken`].
    Commit,
    /// [`Event::Acknowledged`].
    Acknowledge,
    /// [`Event::GivenUp`].
    GiveUp,
    /// [`Event::Probed`].
    Probe,
    /// Answer those who wait. No event.
    AnswerSync(Vec<SyncId>, Answer),
    /// It has failed for longer than a reconnect takes. No event.
    ReportFailing,
    /// It works again. No event.
    ReportRecovered,
    /// It will not be tried again by itself. No event.
    ReportStopped,
    /// An epoch gave up its cut, so many in a row. No event.
    ReportGaveUp(u32),
}

/// The machine. Times are of the monotonic clock.
#[derive(Clone, Debug)]
pub struct Machine {
    state: State,
    is_paused: bool,
    schedule: Schedule,
    retry: Retry,
    random: u64,
    /// Syncs that still need a cut, and until when they wait.
    waiting: Vec<(SyncId, Duration)>,
    /// Syncs whose cut is made, or whose survey found that none is needed.
    in_cut: Vec<(SyncId, Duration)>,
    is_kicked: bool,
    /// A cycle has begun and not ended; a failure does not end it.
    in_cycle: bool,
    /// Live passes of the epoch being built.
    passes: u32,
    /// Marked bytes before the last pass but one.
    marked_before: u64,
    bytes_per_second: u64,
    /// The next survey follows a give-up: pending blocks get a pass however few they are.
    after_give_up: bool,
    give_ups: u32,
    chain_breaks: u32,
    held_until: Duration,
    pass_bytes_min: u64,
}

impl Machine {
    /// A machine before its first event. `random`: any number, for jitter.
    pub fn new(interval: Duration, is_paused: bool, now: Duration, random: u64) -> Self {
        Self {
            state: State::New,
            is_paused,
            schedule: Schedule::new(interval, now, random),
            retry: Retry::default(),
            random,
            waiting: Vec::new(),
            in_cut: Vec::new(),
            is_kicked: false,
            in_cycle: false,
            passes: 0,
            marked_before: 0,
            bytes_per_second: 0,
            after_give_up: false,
            give_ups: 0,
            chain_breaks: 0,
            held_until: Duration::ZERO,
            pass_bytes_min: PASS_BYTES_MIN,
        }
    }

    /// Another bound than [`PASS_BYTES_MIN`], in bytes of disk.
    pub fn with_pass_bytes_min(mut self, bytes: u64) -> Self {
        self.pass_bytes_min = bytes;
        self
    }

    /// The state.
    pub fn state(&self) -> State {
        self.state
    }

    /// Whether the operator has paused it.
    pub fn is_paused(&self) -> bool {
        self.is_paused
    }

    /// The schedule of cycles.
    pub fn schedule(&self) -> &Schedule {
        &self.schedule
    }

    /// The schedule of retries.
    pub fn retry(&self) -> &Retry {
        &self.retry
    }

    /// Give-ups in a row.
    pub fn give_ups(&self) -> u32 {
        self.give_ups
    }

    /// When [`Event::TimePassed`] would do something; none in a busy state or a final one.
    pub fn wake_at(&self) -> Option<Duration> {
        match self.state {
            State::Idle => Some(self.schedule.due_at()),
            State::HeldBack => Some(self.held_until),
            State::Retrying => self.retry.wake_at(),
            _ => None,
        }
    }

    /// Whether an action is under way whose event must come next.
    pub fn is_busy(&self) -> bool {
        self.action().is_some()
    }

    /// The one action of a state; none: the state waits.
    fn action(&self) -> Option<Action> {
        Some(match self.state {
            State::Recovering => Action::Recover,
            State::Surveying => Action::Survey,
            State::Renewing => Action::Renew,
            State::LiveCutting => Action::CutLive,
            State::LiveDraining | State::Draining => Action::Drain,
            State::LivePass => Action::ShipLive,
            State::Cutting => Action::CutFinal,
            State::Shipping => Action::ShipFrozen,
            State::Committing => Action::Commit,
            State::Acknowledging => Action::Acknowledge,
            State::GivingUp => Action::GiveUp,
            State::Probing => Action::Probe,
            State::New | State::Idle | State::HeldBack => return None,
            State::Retrying | State::Paused | State::Stopped => return None,
        })
    }

    /// One step.
    pub fn step(&mut self, now: Duration, event: Event, out: &mut Vec<Action>) {
        self.random =
            self.random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        self.waiting.retain(|(_, deadline)| *deadline > now);
        self.in_cut.retain(|(_, deadline)| *deadline > now);
        match event {
            Event::SyncAsked { id, deadline } => self.sync_asked(now, id, deadline, out),
            Event::KickAsked => self.kick_asked(now, out),
            Event::PauseAsked => self.pause_asked(out),
            Event::ResumeAsked => self.resume_asked(now, out),
            Event::IntervalSet(interval) => {
                self.schedule.set_interval(interval, now);
                self.time_passed(now, out);
            }
            Event::Started => self.enter(State::Recovering, out),
            Event::TimePassed => self.time_passed(now, out),
            Event::Probed(has_answered) => self.probed(now, has_answered, out),
            Event::Failed { is_recoverable, has_progressed } => {
                self.failed(now, is_recoverable, has_progressed, out);
            }
            Event::ChainBroken => self.chain_broken(now, out),
            _ => self.work_done(now, event, out),
        }
        self.check_invariants();
    }

    /// The result of an action that did not fail.
    fn work_done(&mut self, now: Duration, event: Event, out: &mut Vec<Action>) {
        use Event as E;
        use State as S;
        match (self.state, event) {
            (S::Recovering, E::Recovered(found)) => self.recovered(now, found, out),
            (S::Surveying, E::Surveyed(survey)) => self.surveyed(now, survey, out),
            (S::Renewing, E::Renewed) => {
                let ids = std::mem::take(&mut self.in_cut);
                self.cycle_ended(now, ids, Answer::NoChanges, out);
            }
            (S::LiveCutting, E::CutMade) => self.enter(S::LiveDraining, out),
            (S::LiveDraining, E::Drained(true)) => self.enter(S::LivePass, out),
            (S::LivePass, E::PassShipped { bytes_per_second }) => {
                self.worked(out);
                self.passes += 1;
                self.bytes_per_second = bytes_per_second;
                self.enter(S::Surveying, out);
            }
            (S::Cutting, E::CutMade) => {
                self.in_cut.append(&mut self.waiting);
                self.enter(S::Draining, out);
            }
            (S::Draining, E::Drained(true)) => self.enter(S::Shipping, out),
            (S::Shipping, E::FrozenShipped) => self.enter(S::Committing, out),
            (S::Draining | S::Shipping | S::Committing, E::GaveUp) => {
                self.waiting.append(&mut self.in_cut);
                self.give_ups += 1;
                out.push(Action::ReportGaveUp(self.give_ups));
                self.enter(S::GivingUp, out);
            }
            (S::GivingUp, E::GivenUp) => {
                self.after_give_up = true;
                // However many passes there were: one takes what is pending now.
                self.passes = self.passes.min(PASSES_MAX - 1);
                self.enter(S::Surveying, out);
            }
            (S::Committing, E::Committed) => self.enter(S::Acknowledging, out),
            (S::Acknowledging, E::Acknowledged) => self.acknowledged(now, out),
            // Not drained yet, or a transfer was interrupted: the same again, unless paused.
            (state, E::Drained(false) | E::Interrupted) => self.enter(state, out),
            (state, event) => debug_assert!(false, "{event:?} in {state:?}"),
        }
    }

    /// Goes to a state and begins its action. While paused, only what must end is begun.
    fn enter(&mut self, state: State, out: &mut Vec<Action>) {
        let must_end = matches!(
            state,
            State::Recovering | State::Committing | State::Acknowledging | State::GivingUp | State::Stopped
        );
        if self.is_paused && !must_end {
            self.state = State::Paused;
            self.answer_all(Answer::Paused, out);
            return;
        }
        self.state = state;
        out.extend(self.action());
    }

    fn recovered(&mut self, now: Duration, found: Found, out: &mut Vec<Action>) {
        match found {
            Found::Committed => self.enter(State::Acknowledging, out),
            Found::Frozen => self.enter(State::Draining, out),
            Found::NothingFrozen => {
                // A cut that was abandoned answers nobody.
                self.waiting.append(&mut self.in_cut);
                self.rest(now, out);
            }
        }
    }

    /// Waits for the next cycle, or begins it.
    fn rest(&mut self, now: Duration, out: &mut Vec<Action>) {
        let is_unfinished = self.in_cycle || self.retry.since().is_some();
        let is_wanted = is_unfinished || !self.waiting.is_empty() || self.is_kicked;
        if !is_wanted && !self.schedule.is_due(now) {
            return self.enter(State::Idle, out);
        }
        self.begin_cycle(now, out);
    }

    fn begin_cycle(&mut self, now: Duration, out: &mut Vec<Action>) {
        self.is_kicked = false;
        self.in_cycle = true;
        self.schedule.began(now);
        self.enter(State::Surveying, out);
    }

    fn surveyed(&mut self, now: Duration, survey: Survey, out: &mut Vec<Action>) {
        if !survey.has_changes {
            // Who asks from now on may have written after the survey.
            self.in_cut.append(&mut self.waiting);
            return self.enter(State::Renewing, out);
        }
        let after_give_up = std::mem::take(&mut self.after_give_up);
        if survey.unmade_bytes > self.pass_bytes_min || (after_give_up && survey.unmade_bytes > 0) {
            if self.passes < PASSES_MAX {
                self.marked_before = self.marked_before.max(survey.marked_bytes);
                return self.enter(State::LiveDraining, out);
            }
        } else if after_give_up || self.passes > 0 {
            if self.needs_another_pass(&survey) {
                self.marked_before = survey.marked_bytes;
                return self.enter(State::LiveCutting, out);
            }
            // The guest overwrites faster than it can be preserved: not again before the next cycle
            // is due, counted from now.
            let is_storm = self.give_ups > 0 && self.give_ups.is_multiple_of(GIVE_UPS_ALERT);
            if is_storm && self.waiting.is_empty() && self.passes > 0 {
                self.schedule.began(now);
                self.passes = 0;
                self.in_cycle = false;
                return self.enter(State::Idle, out);
            }
        }
        if survey.is_held_back {
            self.held_until = now + HELD_BACK_STEP;
            return self.enter(State::HeldBack, out);
        }
        self.enter(State::Cutting, out);
    }

    /// A live cut and pass more, before the final cut: while much was marked during the pass, and
    /// less than before.
    fn needs_another_pass(&self, survey: &Survey) -> bool {
        let enough = self.pass_bytes_min.max(self.bytes_per_second.saturating_mul(PASS_SECONDS));
        let is_shrinking = self.passes == 1 || survey.marked_bytes < self.marked_before / 10 * 9;
        survey.marked_bytes > enough && is_shrinking && self.passes < PASSES_MAX
    }

    fn acknowledged(&mut self, now: Duration, out: &mut Vec<Action>) {
        self.passes = 0;
        self.marked_before = 0;
        self.give_ups = 0;
        let ids = std::mem::take(&mut self.in_cut);
        self.cycle_ended(now, ids, Answer::Durable, out);
    }

    fn cycle_ended(
        &mut self,
        now: Duration,
        ids: Vec<(SyncId, Duration)>,
        answer: Answer,
        out: &mut Vec<Action>,
    ) {
        self.worked(out);
        self.in_cycle = false;
        self.chain_breaks = 0;
        answer_to(ids, answer, out);
        self.rest(now, out);
    }

    fn worked(&mut self, out: &mut Vec<Action>) {
        if self.retry.succeeded() {
            out.push(Action::ReportRecovered);
        }
    }

    fn time_passed(&mut self, now: Duration, out: &mut Vec<Action>) {
        match self.state {
            State::Idle if self.schedule.is_due(now) => self.begin_cycle(now, out),
            State::HeldBack if self.held_until <= now => self.enter(State::Surveying, out),
            State::Retrying => match self.retry.due(now) {
                Due::Attempt => self.enter(State::Recovering, out),
                Due::Probe => self.enter(State::Probing, out),
                Due::Nothing => {}
            },
            _ => {}
        }
    }

    fn sync_asked(&mut self, now: Duration, id: SyncId, deadline: Duration, out: &mut Vec<Action>) {
        match self.state {
            _ if self.is_paused => answer_to(vec![(id, deadline)], Answer::Paused, out),
            State::Stopped => answer_to(vec![(id, deadline)], Answer::Failed, out),
            _ => {
                self.waiting.push((id, deadline));
                self.hurry(now, out);
            }
        }
    }

    fn kick_asked(&mut self, now: Duration, out: &mut Vec<Action>) {
        if !self.is_paused && self.state != State::Stopped {
            self.is_kicked = true;
            self.hurry(now, out);
        }
    }

    /// Somebody wants it now: ends a wait. `sync` also ends the wait after a failure.
    fn hurry(&mut self, now: Duration, out: &mut Vec<Action>) {
        match self.state {
            State::Idle => self.begin_cycle(now, out),
            State::Retrying => self.enter(State::Recovering, out),
            _ => {}
        }
    }

    fn pause_asked(&mut self, out: &mut Vec<Action>) {
        self.is_paused = true;
        // A failure that needs a person stays in sight; resuming leads out of both.
        if !self.is_busy() && !matches!(self.state, State::Stopped | State::New) {
            self.enter(State::Paused, out);
        }
    }

    fn resume_asked(&mut self, now: Duration, out: &mut Vec<Action>) {
        let was_paused = std::mem::take(&mut self.is_paused);
        match self.state {
            State::Paused | State::Stopped => {
                self.schedule.resumed(now);
                self.worked(out);
                self.chain_breaks = 0;
                self.enter(State::Recovering, out);
            }
            State::Retrying if !was_paused => self.enter(State::Recovering, out),
            _ => {}
        }
    }

    fn probed(&mut self, now: Duration, has_answered: bool, out: &mut Vec<Action>) {
        if self.state != State::Probing {
            return;
        }
        let is_over = self.retry.probed(now, has_answered, self.random);
        let wants = !self.waiting.is_empty() || self.is_kicked;
        self.enter(if is_over || wants { State::Recovering } else { State::Retrying }, out);
    }

    fn chain_broken(&mut self, now: Duration, out: &mut Vec<Action>) {
        self.chain_breaks += 1;
        if self.chain_breaks < CHAIN_BREAKS_MAX {
            return self.enter(State::Recovering, out);
        }
        self.chain_breaks = 0;
        self.failed(now, true, false, out);
    }

    fn failed(&mut self, now: Duration, is_recoverable: bool, has_progressed: bool, out: &mut Vec<Action>) {
        if has_progressed {
            self.worked(out);
        }
        if !is_recoverable {
            self.enter(State::Stopped, out);
            out.push(Action::ReportStopped);
            return self.answer_all(Answer::Failed, out);
        }
        if self.retry.failed(now, self.random) {
            out.push(Action::ReportFailing);
        }
        if self.retry.is_failing() {
            self.is_kicked = false;
            self.answer_all(Answer::Failed, out);
        }
        self.enter(State::Retrying, out);
    }

    fn answer_all(&mut self, answer: Answer, out: &mut Vec<Action>) {
        answer_to(std::mem::take(&mut self.waiting), answer, out);
        answer_to(std::mem::take(&mut self.in_cut), answer, out);
    }

    /// What holds after each step.
    pub fn check_invariants(&self) {
        debug_assert!(self.passes <= PASSES_MAX + 1, "passes are bounded");
        let rests = matches!(self.state, State::Paused | State::Stopped);
        debug_assert!(!rests || (self.waiting.is_empty() && self.in_cut.is_empty()), "nobody waits in vain");
        debug_assert!(self.state != State::Paused || self.is_paused);
        debug_assert!(self.state != State::Retrying || self.retry.wake_at().is_some(), "retries end");
        debug_assert!(self.state != State::Idle || self.waiting.is_empty(), "a sync begins a cycle");
        debug_assert!(self.state != State::Idle || !self.is_paused);
        let has_cut = matches!(
            self.state,
            State::Renewing | State::Draining | State::Shipping | State::Committing | State::Acknowledging
        );
        let may_have_cut = matches!(self.state, State::Recovering | State::Retrying | State::Probing);
        debug_assert!(self.in_cut.is_empty() || has_cut || may_have_cut, "{:?} has no cut", self.state);
    }
}

fn answer_to(ids: Vec<(SyncId, Duration)>, answer: Answer, out: &mut Vec<Action>) {
    if !ids.is_empty() {
        out.push(Action::AnswerSync(ids.into_iter().map(|(id, _)| id).collect(), answer));
    }
}

#[cfg(test)]
mod tests;
