//! Rules broken on purpose, to show that the tests bite.
//!
//! Only in test builds and with the feature `canary`; elsewhere every question is answered `false`
//! at compile time. `AFTERIMAGE_CANARY=T1|T3|T4|T6` breaks one rule, `AFTERIMAGE_PAUSES=1` slows
//! the steps of a write down, so that rare interleavings become frequent.

/// A rule that can be broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(dead_code)]
pub(crate) enum Rule {
    /// The cut stores first and waits for those inside step 2 afterwards.
    T1,
    /// Read before the writers of the epoch have left.
    T2,
    /// The shipper believes its read.
    T3,
    /// Marks are asked before a lost block is read again.
    T4,
    /// Cools without waiting for pinned writers, and without making the maps durable.
    T6,
}

/// Which rule is broken, if any.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Mutation {
    #[cfg(any(test, feature = "canary"))]
    broken: Option<Rule>,
    #[cfg(any(test, feature = "canary"))]
    pauses: bool,
}

/// Steps between which a pause may be put.
#[derive(Clone, Copy, Debug)]
#[allow(dead_code)]
pub(crate) enum Step {
    /// The epoch number was read, nothing is marked.
    Entered,
    /// Marked, nothing preserved.
    Marked,
    /// Preserved, not written.
    Preserved,
}

impl Mutation {
    /// As the environment says.
    pub(crate) fn from_environment() -> Self {
        #[cfg(feature = "canary")]
        {
            let broken = match std::env::var("AFTERIMAGE_CANARY").as_deref() {
                Ok("T1") => Some(Rule::T1),
                Ok("T2") => Some(Rule::T2),
                Ok("T3") => Some(Rule::T3),
                Ok("T4") => Some(Rule::T4),
                Ok("T6") => Some(Rule::T6),
                _ => None,
            };
            let pauses = std::env::var("AFTERIMAGE_PAUSES").is_ok_and(|v| v == "1");
            Self { broken, pauses }
        }
        #[cfg(not(feature = "canary"))]
        Self::default()
    }

    /// Breaks a rule.
    #[cfg(test)]
    pub(crate) fn broken(rule: Rule) -> Self {
        Self { broken: Some(rule), pauses: false }
    }

    /// Whether this rule is broken.
    #[inline]
    pub(crate) fn breaks(self, rule: Rule) -> bool {
        #[cfg(any(test, feature = "canary"))]
        return self.broken == Some(rule);
        #[cfg(not(any(test, feature = "canary")))]
        {
            let _ = rule;
            false
        }
    }

    /// A pause of up to 2 ms, now and then, if asked for.
    #[inline]
    pub(crate) fn pause(self, step: Step) {
        let _ = step;
        #[cfg(any(test, feature = "canary"))]
        if self.pauses {
            let dice: u32 = rand::random();
            if dice.is_multiple_of(4) {
                std::thread::sleep(std::time::Duration::from_micros(u64::from(dice >> 8) % 2000));
            }
        }
    }
}
