//! Drives the state machine: commands in, actions carried out, status out. One loop, the body of
//! the thread `shipper:VM`.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::Ordering;
use std::time::Duration;

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender};

use crate::base::{Error, ErrorKind, Result, Timestamp};
use crate::core::epoch::{Action, Answer, Event, Machine, State, SyncId};
use crate::ship::engine::Engine;
use crate::ship::shipper::Command;
use crate::ship::status::{ShipState, SyncReply};

/// Parts kept in memory while a failure lasts, in bytes.
const IN_HAND_BYTES_MAX: usize = 4 << 20;

/// The machine, the engine, and those who wait.
pub(super) struct Driver {
    pub(super) machine: Machine,
    pub(super) engine: Engine,
    queue: VecDeque<Action>,
    waiting: HashMap<SyncId, Sender<Result<SyncReply>>>,
    next_sync: SyncId,
}

impl Driver {
    /// A driver whose machine has not started yet.
    pub(super) fn new(engine: Engine) -> Self {
        Self::with_random(engine, rand::random())
    }

    /// The same, with a given number for all jitter.
    pub(super) fn with_random(engine: Engine, random: u64) -> Self {
        let now = engine.outside.clock.monotonic();
        let machine = Machine::new(engine.config.interval, engine.config.paused, now, random);
        Self { machine, engine, queue: VecDeque::new(), waiting: HashMap::new(), next_sync: 0 }
    }

    /// The loop; ends at [`Command::Stop`].
    pub(super) fn run(&mut self, commands: &Receiver<Command>) {
        self.event(Event::Started);
        loop {
            while let Ok(command) = commands.try_recv() {
                if !self.command(command) {
                    return;
                }
            }
            if self.act() {
                continue;
            }
            match self.wait(commands) {
                Ok(command) => {
                    if !self.command(command) {
                        return;
                    }
                }
                Err(RecvTimeoutError::Timeout) => self.event(Event::TimePassed),
                Err(RecvTimeoutError::Disconnected) => return,
            }
        }
    }

    fn wait(&self, commands: &Receiver<Command>) -> Result<Command, RecvTimeoutError> {
        match self.machine.wake_at() {
            Some(at) => {
                let now = self.engine.outside.clock.monotonic();
                commands.recv_timeout(at.saturating_sub(now))
            }
            None => commands.recv().map_err(|_| RecvTimeoutError::Disconnected),
        }
    }

    /// One step of the machine; what it wants is queued.
    pub(super) fn event(&mut self, event: Event) {
        let now = self.engine.outside.clock.monotonic();
        let mut actions = Vec::new();
        self.machine.step(now, event, &mut actions);
        self.queue.extend(actions);
        self.show();
    }

    /// Carries out one action. `false`: there is none.
    pub(super) fn act(&mut self) -> bool {
        let Some(action) = self.queue.pop_front() else { return false };
        match action {
            Action::AnswerSync(ids, answer) => self.answer(&ids, answer),
            Action::ReportFailing => self.report_failure(false),
            Action::ReportStopped => self.report_failure(true),
            Action::ReportRecovered => {
                log::info!("{}: delivery works again", self.engine.config.name);
                self.engine.outside.observer.recovered(self.engine.config.vm);
            }
            Action::ReportGaveUp(in_a_row) => self.report_give_up(in_a_row),
            // Paused meanwhile: a transfer is not begun.
            Action::ShipLive | Action::ShipFrozen if self.machine.is_paused() => {
                self.event(Event::Interrupted);
            }
            work => {
                let event = self.engine.perform(&work);
                self.event(event);
            }
        }
        true
    }

    /// `false`: stop.
    pub(super) fn command(&mut self, command: Command) -> bool {
        match command {
            Command::Stop => return false,
            Command::Sync { reply, timeout } => self.sync(reply, timeout),
            Command::Pause => {
                self.engine.interrupt.store(false, Ordering::Relaxed);
                self.event(Event::PauseAsked);
            }
            Command::Resume => self.event(Event::ResumeAsked),
            Command::SetInterval(interval) => self.event(Event::IntervalSet(interval)),
            Command::SetName(name) => self.engine.set_name(name),
            Command::Kick => self.event(Event::KickAsked),
        }
        true
    }

    fn sync(&mut self, reply: Sender<Result<SyncReply>>, timeout: Duration) {
        let id = self.next_sync;
        self.next_sync += 1;
        // Those whose callers gave up are not answered any more.
        if self.waiting.len() > 1000 {
            self.waiting.clear();
        }
        self.waiting.insert(id, reply);
        let deadline = self.engine.outside.clock.monotonic().saturating_add(timeout);
        self.event(Event::SyncAsked { id, deadline });
    }

    fn answer(&mut self, ids: &[SyncId], answer: Answer) {
        for id in ids {
            if let Some(reply) = self.waiting.remove(id) {
                let _ = reply.send(self.reply(answer));
            }
        }
    }

    fn reply(&self, answer: Answer) -> Result<SyncReply> {
        let status = self.engine.status();
        let vm = &self.engine.config.name;
        let failed = || match &status.failure {
            Some(failure) => failure.to_error(),
            None => Error::new(ErrorKind::Busy, format!("{vm} could not be delivered")),
        };
        match answer {
            Answer::Durable => status.last_delivered.map(SyncReply::Durable).ok_or_else(failed),
            Answer::NoChanges => {
                let as_of = status.current_as_of.unwrap_or(Timestamp(0));
                Ok(SyncReply::NoChanges { current_as_of: as_of })
            }
            Answer::Failed => Err(failed()),
            Answer::Paused => Err(Error::new(ErrorKind::Refused, format!("replication of {vm} is paused"))
                .hint(format!("afterimage resume {vm}"))),
        }
    }

    fn report_failure(&mut self, is_final: bool) {
        self.engine.trim_in_hand(IN_HAND_BYTES_MAX);
        let failure = {
            let mut status = self.engine.status();
            status.counts.failures += 1;
            status.failure.clone()
        };
        let Some(failure) = failure else { return };
        let rest = if is_final { "it is not tried again by itself" } else { "it is tried again" };
        log::warn!("{}: {}; {rest}", self.engine.config.name, failure.sentence());
        self.engine.outside.observer.failed(self.engine.config.vm, &failure, is_final);
    }

    fn report_give_up(&mut self, in_a_row: u32) {
        let figures = self.engine.outside.source.figures();
        let preserved = figures.iter().map(|(_, f)| f.preserved).sum();
        self.engine.status().counts.give_ups += 1;
        log::info!("{}: an epoch gave up its cut, {in_a_row} in a row", self.engine.config.name);
        self.engine.outside.observer.gave_up(self.engine.config.vm, in_a_row, preserved);
    }

    /// Brings the status up to date with the machine.
    fn show(&self) {
        let (clock, machine) = (&self.engine.outside.clock, &self.machine);
        let (now, wall) = (clock.monotonic(), clock.now());
        let at = |t: Duration| {
            if t >= now { wall.plus(t - now) } else { Timestamp(wall.0 - millis(now - t)) }
        };
        let mut status = self.engine.status();
        status.state = match machine.state() {
            State::Recovering if machine.retry().is_failing() => ShipState::Retrying,
            state => state_shown(state),
        };
        status.paused = machine.is_paused();
        status.interval_ms = u64::try_from(millis(machine.schedule().interval())).unwrap_or(0);
        status.counts.missed = machine.schedule().missed();
        status.give_ups_in_a_row = machine.give_ups();
        let is_over = matches!(machine.state(), State::Paused | State::Stopped);
        status.next_cycle = (!is_over).then(|| at(machine.schedule().due_at()));
        status.next_attempt = machine.retry().attempt_at().map(at).filter(|_| !is_over);
        status.failing_since = machine.retry().since().map(at);
        if machine.state() != State::Stopped && status.failing_since.is_none() {
            status.failure = None;
        }
        if !matches!(machine.state(), State::HeldBack | State::Surveying) {
            status.held_back = None;
        }
    }
}

/// The machine's state in the words of the status.
fn state_shown(state: State) -> ShipState {
    match state {
        State::New | State::Recovering => ShipState::Starting,
        State::Idle | State::Surveying | State::Renewing => ShipState::Idle,
        State::HeldBack => ShipState::HeldBack,
        State::LiveCutting | State::LivePass => ShipState::LivePass,
        State::LiveDraining | State::Cutting | State::Draining | State::GivingUp => ShipState::Draining,
        State::Shipping => ShipState::Shipping,
        State::Committing => ShipState::Committing,
        State::Acknowledging => ShipState::Acknowledging,
        State::Retrying | State::Probing => ShipState::Retrying,
        State::Paused => ShipState::Paused,
        State::Stopped => ShipState::Stopped,
    }
}

fn millis(d: Duration) -> i64 {
    i64::try_from(d.as_millis()).unwrap_or(i64::MAX)
}
