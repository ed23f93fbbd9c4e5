use super::*;
use proptest::prelude::*;

const HOUR: Duration = Duration::from_secs(3600);

fn s(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

/// A machine that has recovered with nothing frozen, and its first cycle's survey under way.
fn surveying() -> Machine {
    let mut m = Machine::new(s(30), false, s(0), 0);
    assert_eq!(actions(&mut m, 0, Event::Started), [Action::Recover]);
    assert_eq!(actions(&mut m, 0, Event::Recovered(Found::NothingFrozen)), [Action::Survey]);
    m
}

fn actions(m: &mut Machine, at: u64, event: Event) -> Vec<Action> {
    let mut out = Vec::new();
    m.step(s(at), event, &mut out);
    out
}

fn survey(unmade_bytes: u64, marked_bytes: u64) -> Event {
    Event::Surveyed(Survey { has_changes: true, unmade_bytes, marked_bytes, is_held_back: false })
}

/// Runs events that each lead to one action.
fn path(m: &mut Machine, steps: &[(Event, Action)]) {
    for (event, action) in steps {
        assert_eq!(actions(m, 1, *event), std::slice::from_ref(action), "after {event:?}");
    }
}

const CUT_TO_COMMIT: [(Event, Action); 3] = [
    (Event::CutMade, Action::Drain),
    (Event::Drained(true), Action::ShipFrozen),
    (Event::FrozenShipped, Action::Commit),
];

fn failed() -> Event {
    Event::Failed { is_recoverable: true, has_progressed: false }
}

#[test]
fn a_delta_goes_from_cut_to_acknowledgement() {
    let mut m = surveying();
    path(&mut m, &[(survey(0, 5000), Action::CutFinal)]);
    path(&mut m, &CUT_TO_COMMIT);
    path(&mut m, &[(Event::Committed, Action::Acknowledge)]);
    assert!(actions(&mut m, 2, Event::Acknowledged).is_empty());
    assert_eq!((m.state(), m.wake_at()), (State::Idle, Some(s(30))));
    assert_eq!(actions(&mut m, 30, Event::TimePassed), [Action::Survey]);
    assert_eq!(actions(&mut m, 31, Event::Surveyed(Survey::default())), [Action::Renew]);
    assert!(actions(&mut m, 31, Event::Renewed).is_empty());
}

#[test]
fn initial_replication_goes_in_passes_while_they_shrink() {
    let mut m = surveying();
    let pass = |rate| (Event::PassShipped { bytes_per_second: rate }, Action::Survey);
    path(&mut m, &[(survey(1 << 40, 0), Action::Drain), (Event::Drained(true), Action::ShipLive)]);
    path(&mut m, &[pass(1 << 20), (survey(0, 8 << 30), Action::CutLive), (Event::CutMade, Action::Drain)]);
    path(&mut m, &[(Event::Drained(false), Action::Drain), (Event::Drained(true), Action::ShipLive)]);
    // Half of it was marked during the second pass: another one.
    path(&mut m, &[pass(1 << 20), (survey(0, 4 << 30), Action::CutLive), (Event::CutMade, Action::Drain)]);
    path(&mut m, &[(Event::Drained(true), Action::ShipLive), pass(1 << 20)]);
    // No less than before: the final cut.
    path(&mut m, &[(survey(0, 4 << 30), Action::CutFinal)]);
    path(&mut m, &CUT_TO_COMMIT);
}

#[test]
fn passes_end_when_a_few_seconds_ship_the_rest_and_are_bounded() {
    let mut m = surveying();
    let pass = |rate| (Event::PassShipped { bytes_per_second: rate }, Action::Survey);
    path(&mut m, &[(survey(1 << 40, 0), Action::Drain), (Event::Drained(true), Action::ShipLive)]);
    path(&mut m, &[pass(100 << 20), (survey(0, 400 << 20), Action::CutFinal)]);
    let mut m = surveying();
    path(&mut m, &[(survey(1 << 40, 0), Action::Drain), (Event::Drained(true), Action::ShipLive)]);
    let mut marked = 1u64 << 50;
    let mut passes = 1;
    loop {
        path(&mut m, &[pass(1)]);
        marked /= 2;
        match actions(&mut m, 1, survey(0, marked)).as_slice() {
            [Action::CutLive] => {
                path(&mut m, &[(Event::CutMade, Action::Drain), (Event::Drained(true), Action::ShipLive)])
            }
            [Action::CutFinal] => break,
            other => panic!("{other:?}"),
        }
        passes += 1;
    }
    assert_eq!(passes, PASSES_MAX);
}

#[test]
fn a_give_up_is_followed_by_a_live_pass_and_another_cut_and_three_by_a_rest() {
    let mut m = surveying();
    path(&mut m, &[(survey(0, 5000), Action::CutFinal)]);
    for give_ups in 1..=3 {
        path(&mut m, &CUT_TO_COMMIT);
        let told = actions(&mut m, 1, Event::GaveUp);
        assert_eq!(told, [Action::ReportGaveUp(give_ups), Action::GiveUp]);
        path(
            &mut m,
            &[
                (Event::GivenUp, Action::Survey),
                (survey(4096, 0), Action::Drain),
                (Event::Drained(true), Action::ShipLive),
                (Event::PassShipped { bytes_per_second: 1 }, Action::Survey),
            ],
        );
        let next = actions(&mut m, 1, survey(0, 4096));
        assert_eq!(next, if give_ups < 3 { vec![Action::CutFinal] } else { vec![] });
    }
    assert_eq!((m.state(), m.give_ups()), (State::Idle, 3));
    assert_eq!(actions(&mut m, 30, Event::TimePassed), [Action::Survey]);
}

/// Its cycles are due all the time: each give-up is followed by a pass, and three by a rest.
#[test]
fn an_epoch_that_keeps_giving_up_keeps_its_passes_and_rests_though_it_is_overdue() {
    let mut m = Machine::new(s(1), false, s(0), 0);
    actions(&mut m, 0, Event::Started);
    actions(&mut m, 0, Event::Recovered(Found::NothingFrozen));
    let (mut at, mut rests) = (0, 0);
    assert_eq!(actions(&mut m, at, survey(0, 5000)), [Action::CutFinal]);
    for give_ups in 1..=40 {
        at += 5;
        for (event, action) in &CUT_TO_COMMIT {
            assert_eq!(actions(&mut m, at, *event), std::slice::from_ref(action));
        }
        assert_eq!(actions(&mut m, at, Event::GaveUp), [Action::ReportGaveUp(give_ups), Action::GiveUp]);
        assert_eq!(actions(&mut m, at, Event::GivenUp), [Action::Survey]);
        assert_eq!(actions(&mut m, at, survey(4096, 0)), [Action::Drain], "give-up {give_ups}");
        assert_eq!(actions(&mut m, at, Event::Drained(true)), [Action::ShipLive]);
        assert_eq!(actions(&mut m, at, Event::PassShipped { bytes_per_second: 1 }), [Action::Survey]);
        if actions(&mut m, at, survey(0, 4096)).is_empty() {
            assert_eq!(m.state(), State::Idle);
            assert!(m.wake_at().unwrap() > s(at));
            rests += 1;
            at = m.wake_at().unwrap().as_secs() + 1;
            assert_eq!(actions(&mut m, at, Event::TimePassed), [Action::Survey]);
            assert_eq!(actions(&mut m, at, survey(0, 4096)), [Action::CutFinal]);
        }
    }
    assert_eq!(rests, 13);
}

#[test]
fn a_sync_after_the_survey_is_not_answered_by_it() {
    let mut m = surveying();
    let sync = |id| Event::SyncAsked { id, deadline: HOUR };
    assert!(actions(&mut m, 1, sync(1)).is_empty());
    path(&mut m, &[(Event::Surveyed(Survey::default()), Action::Renew)]);
    assert!(actions(&mut m, 1, sync(2)).is_empty());
    let told = actions(&mut m, 2, Event::Renewed);
    assert_eq!(told, [Action::AnswerSync(vec![1], Answer::NoChanges), Action::Survey]);
    path(&mut m, &[(survey(0, 1), Action::CutFinal)]);
    path(&mut m, &CUT_TO_COMMIT);
    path(&mut m, &[(Event::Committed, Action::Acknowledge)]);
    let told = actions(&mut m, 3, Event::Acknowledged);
    assert_eq!(told, [Action::AnswerSync(vec![2], Answer::Durable)]);
}

#[test]
fn every_retry_begins_with_the_head_and_a_lost_reply_is_acknowledged() {
    let mut m = surveying();
    path(&mut m, &[(survey(0, 5000), Action::CutFinal)]);
    path(&mut m, &CUT_TO_COMMIT);
    assert!(actions(&mut m, 1, failed()).is_empty());
    assert_eq!((m.state(), m.wake_at()), (State::Retrying, Some(s(2))));
    assert_eq!(actions(&mut m, 2, Event::TimePassed), [Action::Recover]);
    path(&mut m, &[(Event::Recovered(Found::Committed), Action::Acknowledge)]);
    assert!(actions(&mut m, 2, Event::Acknowledged).is_empty());
    assert_eq!(m.retry(), &Retry::default());
}

#[test]
fn a_failed_cycle_goes_on_when_the_vault_answers() {
    let mut m = surveying();
    let (mut at, mut told) = (1, Vec::new());
    told.extend(actions(&mut m, at, failed()));
    while !m.retry().is_failing() {
        at = m.wake_at().unwrap().as_secs();
        assert_eq!(actions(&mut m, at, Event::TimePassed), [Action::Recover]);
        told.extend(actions(&mut m, at, failed()));
    }
    assert_eq!(told, [Action::ReportFailing]);
    at = m.wake_at().unwrap().as_secs() + 1;
    assert_eq!(actions(&mut m, at, Event::TimePassed), [Action::Probe]);
    assert!(actions(&mut m, at, Event::Probed(false)).is_empty());
    at = m.wake_at().unwrap().as_secs() + 1;
    assert_eq!(actions(&mut m, at, Event::TimePassed), [Action::Probe]);
    assert_eq!(actions(&mut m, at, Event::Probed(true)), [Action::Recover]);
    path(&mut m, &[(Event::Recovered(Found::NothingFrozen), Action::Survey)]);
    path(&mut m, &[(Event::Surveyed(Survey::default()), Action::Renew)]);
    // The next cycle was due meanwhile.
    assert_eq!(actions(&mut m, at, Event::Renewed), [Action::ReportRecovered, Action::Survey]);
}

#[test]
fn a_sync_is_answered_by_a_cut_made_after_it() {
    let mut m = surveying();
    path(&mut m, &[(survey(0, 5000), Action::CutFinal)]);
    let sync = |id| Event::SyncAsked { id, deadline: HOUR };
    assert!(actions(&mut m, 1, sync(1)).is_empty());
    path(&mut m, &CUT_TO_COMMIT[..1]);
    assert!(actions(&mut m, 1, sync(2)).is_empty());
    path(&mut m, &CUT_TO_COMMIT[1..]);
    path(&mut m, &[(Event::Committed, Action::Acknowledge)]);
    let told = actions(&mut m, 2, Event::Acknowledged);
    assert_eq!(told, [Action::AnswerSync(vec![1], Answer::Durable), Action::Survey]);
    path(&mut m, &[(Event::Surveyed(Survey::default()), Action::Renew)]);
    assert_eq!(actions(&mut m, 3, Event::Renewed), [Action::AnswerSync(vec![2], Answer::NoChanges)]);
}

#[test]
fn a_sync_ends_the_wait_after_a_failure_and_is_told_when_it_fails() {
    let mut m = surveying();
    actions(&mut m, 0, failed());
    actions(&mut m, 1, Event::TimePassed);
    actions(&mut m, 100, failed());
    assert!(m.retry().is_failing());
    assert_eq!(actions(&mut m, 101, Event::SyncAsked { id: 4, deadline: HOUR }), [Action::Recover]);
    let told = actions(&mut m, 101, failed());
    assert_eq!(told, [Action::AnswerSync(vec![4], Answer::Failed)]);
}

#[test]
fn a_final_error_stops_and_resume_checks_again() {
    let mut m = surveying();
    actions(&mut m, 0, Event::SyncAsked { id: 1, deadline: HOUR });
    let told = actions(&mut m, 0, Event::Failed { is_recoverable: false, has_progressed: false });
    assert_eq!(told, [Action::ReportStopped, Action::AnswerSync(vec![1], Answer::Failed)]);
    assert_eq!((m.state(), m.wake_at()), (State::Stopped, None));
    let told = actions(&mut m, 1, Event::SyncAsked { id: 2, deadline: HOUR });
    assert_eq!(told, [Action::AnswerSync(vec![2], Answer::Failed)]);
    assert_eq!(actions(&mut m, 2, Event::ResumeAsked), [Action::Recover]);
}

#[test]
fn a_pause_lets_a_commit_end_and_stops_a_transfer() {
    let mut m = surveying();
    path(&mut m, &[(survey(0, 5000), Action::CutFinal)]);
    path(&mut m, &CUT_TO_COMMIT);
    actions(&mut m, 1, Event::PauseAsked);
    path(&mut m, &[(Event::Committed, Action::Acknowledge)]);
    assert!(actions(&mut m, 1, Event::Acknowledged).is_empty());
    assert_eq!(m.state(), State::Paused);
    let told = actions(&mut m, 1, Event::SyncAsked { id: 2, deadline: HOUR });
    assert_eq!(told, [Action::AnswerSync(vec![2], Answer::Paused)]);
    assert_eq!(actions(&mut m, 9, Event::ResumeAsked), [Action::Recover]);
    path(&mut m, &[(Event::Recovered(Found::Frozen), Action::Drain)]);
    path(&mut m, &CUT_TO_COMMIT[1..2]);
    actions(&mut m, 9, Event::PauseAsked);
    assert!(actions(&mut m, 9, Event::Interrupted).is_empty());
    assert_eq!(m.state(), State::Paused);
}

#[test]
fn a_vault_that_is_behind_holds_back_the_cut() {
    let mut m = surveying();
    let behind = Survey { has_changes: true, is_held_back: true, ..Survey::default() };
    assert!(actions(&mut m, 5, Event::Surveyed(behind)).is_empty());
    assert_eq!((m.state(), m.wake_at()), (State::HeldBack, Some(s(6))));
    assert_eq!(actions(&mut m, 6, Event::TimePassed), [Action::Survey]);
    path(&mut m, &[(survey(0, 1), Action::CutFinal)]);
}

#[test]
fn a_parent_that_is_refused_leads_to_another_look_at_the_head_and_then_to_a_failure() {
    let mut m = surveying();
    path(&mut m, &[(survey(0, 5000), Action::CutFinal)]);
    for _ in 0..2 {
        path(&mut m, &CUT_TO_COMMIT);
        path(
            &mut m,
            &[
                (Event::ChainBroken, Action::Recover),
                (Event::Recovered(Found::NothingFrozen), Action::Survey),
            ],
        );
        path(&mut m, &[(survey(0, 5000), Action::CutFinal)]);
    }
    path(&mut m, &CUT_TO_COMMIT);
    assert!(actions(&mut m, 1, Event::ChainBroken).is_empty());
    assert_eq!(m.state(), State::Retrying);
}

/// What an action may lead to.
fn result_of(action: &Action, dice: u64) -> Option<Event> {
    let survey = Survey {
        has_changes: !dice.is_multiple_of(4),
        unmade_bytes: (dice % 7) << 25,
        marked_bytes: (dice % 11) << 24,
        is_held_back: dice.is_multiple_of(13),
    };
    Some(match action {
        Action::AnswerSync(..) | Action::ReportFailing | Action::ReportRecovered => return None,
        Action::ReportStopped | Action::ReportGaveUp(_) => return None,
        _ if dice.is_multiple_of(9) => {
            Event::Failed { is_recoverable: !dice.is_multiple_of(27), has_progressed: dice.is_multiple_of(2) }
        }
        Action::Recover => {
            let found = [Found::NothingFrozen, Found::Frozen, Found::Committed];
            Event::Recovered(found[(dice % 3) as usize])
        }
        Action::Survey => Event::Surveyed(survey),
        Action::Renew => Event::Renewed,
        Action::CutLive | Action::CutFinal => Event::CutMade,
        Action::Drain => Event::Drained(!dice.is_multiple_of(3)),
        Action::ShipLive if dice.is_multiple_of(5) => Event::Interrupted,
        Action::ShipLive => Event::PassShipped { bytes_per_second: dice % (1 << 24) },
        Action::ShipFrozen | Action::Commit if dice.is_multiple_of(4) => Event::GaveUp,
        Action::ShipFrozen if dice.is_multiple_of(5) => Event::Interrupted,
        Action::ShipFrozen => Event::FrozenShipped,
        Action::Commit if dice.is_multiple_of(7) => Event::ChainBroken,
        Action::Commit => Event::Committed,
        Action::Acknowledge => Event::Acknowledged,
        Action::GiveUp => Event::GivenUp,
        Action::Probe => Event::Probed(dice.is_multiple_of(2)),
    })
}

proptest! {
    /// Whatever comes: invariants hold, one action at a time, every sync is answered once, and
    /// the machine never gets stuck.
    #[test]
    fn any_history_keeps_the_invariants(dice in prop::collection::vec(any::<u64>(), 1..400)) {
        let mut m = Machine::new(s(5), false, s(0), 1);
        let (mut now, mut queue, mut asked, mut answered) = (s(0), Vec::new(), 0u64, Vec::new());
        m.step(now, Event::Started, &mut queue);
        for d in dice {
            now += Duration::from_millis(d % 3000);
            let (work, told): (Vec<_>, Vec<_>) = queue.drain(..).partition(|a| result_of(a, 1).is_some());
            for action in told {
                if let Action::AnswerSync(ids, _) = action {
                    answered.extend(ids);
                }
            }
            prop_assert!(work.len() <= 1, "{:?}", work);
            prop_assert_eq!(work.len() == 1, m.is_busy());
            queue = work;
            match d >> 32 & 15 {
                0 => {
                    asked += 1;
                    m.step(now, Event::SyncAsked { id: asked, deadline: now + s(100) }, &mut queue);
                }
                1 => m.step(now, Event::PauseAsked, &mut queue),
                2 | 3 => m.step(now, Event::ResumeAsked, &mut queue),
                4 => m.step(now, Event::KickAsked, &mut queue),
                5 => m.step(now, Event::IntervalSet(s(d % 9)), &mut queue),
                _ => {
                    if let Some(action) = queue.pop() {
                        if let Some(event) = result_of(&action, d >> 36) {
                            m.step(now, event, &mut queue);
                        }
                    } else {
                        let is_over = matches!(m.state(), State::Paused | State::Stopped);
                        prop_assert_eq!(m.wake_at().is_none(), is_over);
                        now = m.wake_at().map_or(now, |at| at.max(now));
                        m.step(now, Event::TimePassed, &mut queue);
                    }
                }
            }
            m.check_invariants();
        }
        let total = answered.len();
        answered.sort_unstable();
        answered.dedup();
        prop_assert_eq!(total, answered.len(), "answered twice");
    }
}
