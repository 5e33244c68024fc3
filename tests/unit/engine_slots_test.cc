// A rank's picture of its slots, and what the last stage reports.
#include <gtest/gtest.h>

#include "base/error.h"
#include "engine/outputs.h"
#include "engine/slots.h"

namespace drover {
namespace {

StepPlan admit(int32_t slot, int32_t prompt, int32_t group = 0) {
  StepPlan p;
  p.group = group;
  Admission a;
  a.id = static_cast<SequenceId>(100 + slot);
  a.slot = slot;
  a.group = group;
  a.max_new_tokens = 5;
  a.prompt.assign(static_cast<size_t>(prompt), 7);
  p.admitted.push_back(a);
  p.grants.push_back({slot, 0, {slot * 2, slot * 2 + 1}});
  return p;
}

TEST(Slots, APromptInTwoChunksThenDecodes) {
  Slots slots(4, 64, 8, 16);
  StepLayout layout;
  StepPlan p = admit(2, 6);
  p.chunks.push_back({2, 0, 4, false});
  slots.apply(p);
  slots.lay_out(p, layout);
  EXPECT_EQ(layout.row_position, (std::vector<int32_t>{0, 1, 2, 3}));
  EXPECT_TRUE(layout.wanted.empty());

  StepPlan q;
  q.chunks.push_back({2, 4, 2, true});
  slots.apply(q);
  slots.lay_out(q, layout);
  ASSERT_EQ(layout.wanted.size(), 1u);
  EXPECT_EQ(layout.wanted[0].row, 1);
  EXPECT_EQ(layout.wanted[0].position, 6);
  EXPECT_TRUE(layout.wanted[0].first);

  const StepPlan nothing;  // a plan that mentions nobody: the slot goes on
  for (int i = 0; i < 3; ++i) {
    slots.apply(nothing);
    slots.lay_out(nothing, layout);
    EXPECT_EQ(layout.row_position, (std::vector<int32_t>{6 + i}));
    EXPECT_FALSE(layout.wanted[0].first);
  }
}

TEST(Slots, OtherGroupsRest) {
  Slots slots(4, 64, 8, 16);
  StepLayout layout;
  for (int32_t s : {0, 1}) {
    StepPlan p = admit(s, 3, s);
    p.chunks.push_back({s, 0, 3, true});
    slots.apply(p);
    slots.lay_out(p, layout);
    EXPECT_EQ(layout.rows(), 3);
  }
  StepPlan p;
  p.group = 1;
  slots.apply(p);
  slots.lay_out(p, layout);
  EXPECT_EQ(layout.row_slot, (std::vector<int32_t>{1}));
}

TEST(Slots, ASuspendedSequenceIsRecomputedToItsNewestToken) {
  Slots slots(4, 64, 8, 16);
  StepLayout layout;
  StepPlan p = admit(0, 3);
  p.chunks.push_back({0, 0, 3, true});
  slots.apply(p);
  slots.lay_out(p, layout);
  slots.apply({});
  slots.lay_out({}, layout);  // five tokens known or on their way
  StepPlan s;
  s.suspended = {0};
  slots.apply(s);
  slots.lay_out(s, layout);
  EXPECT_EQ(layout.rows(), 0);
  StepPlan again;
  again.grants.push_back({0, 0, {5}});
  again.chunks.push_back({0, 0, 5, true});
  slots.apply(again);
  slots.lay_out(again, layout);
  ASSERT_EQ(layout.wanted.size(), 1u);
  EXPECT_EQ(layout.wanted[0].position, 5);
  EXPECT_FALSE(layout.wanted[0].first);
}

TEST(Slots, BadPlansAreRefused) {
  StepLayout layout;
  Slots slots(4, 64, 8, 16);
  StepPlan retire;
  retire.retired = {1};
  EXPECT_THROW(slots.apply(retire), Error);
  slots.apply(admit(0, 3));
  EXPECT_THROW(slots.apply(admit(0, 3)), Error);  // taken
  StepPlan grant;
  grant.grants.push_back({0, 5, {1}});  // a hole in the page table
  EXPECT_THROW(slots.apply(grant), Error);
  StepPlan page;
  page.grants.push_back({0, 2, {99}});
  EXPECT_THROW(slots.apply(page), Error);
  StepPlan chunk;
  chunk.chunks.push_back({0, 0, 4, true});  // longer than the prompt
  EXPECT_THROW(slots.lay_out(chunk, layout), Error);
  StepPlan early;
  early.chunks.push_back({0, 0, 2, true});  // "last", but not at the newest token
  EXPECT_THROW(slots.lay_out(early, layout), Error);
  EXPECT_THROW(slots.apply(admit(3, 60)), Error);  // 60 + 5 tokens in a slot of 64
  StepPlan other = admit(1, 3, 1);
  other.group = 0;  // a slot's group is admitted in its own plans only
  EXPECT_THROW(slots.apply(other), Error);
}

TEST(Slots, NoneSamplesMoreThanItsNewTokens) {
  Slots slots(1, 64, 8, 16);
  StepLayout layout;
  StepPlan p = admit(0, 3);  // five new tokens
  p.chunks.push_back({0, 0, 3, true});
  slots.apply(p);
  slots.lay_out(p, layout);
  for (int i = 0; i < 4; ++i) slots.lay_out({}, layout);
  EXPECT_THROW(slots.lay_out({}, layout), Error);
}

TEST(Slots, ARowWithoutAPageIsRefused) {
  Slots slots(1, 64, 4, 8);
  StepLayout layout;
  StepPlan p = admit(0, 10);  // two pages of four tokens
  p.chunks.push_back({0, 0, 10, true});
  slots.apply(p);
  EXPECT_THROW(slots.lay_out(p, layout), Error);
}

TEST(Outputs, EndOfSequenceEndsAndSurplusIsDropped) {
  Outputs outputs(2, {2, 3});
  StepPlan p = admit(0, 4);
  outputs.admit(p.admitted);
  StepResult r;
  outputs.add(0, 4, 50, r);
  ASSERT_EQ(r.first.size(), 1u);
  outputs.add(0, 5, 3, r);
  ASSERT_EQ(r.finished.size(), 1u);
  EXPECT_TRUE(r.finished[0].by_eos);
  EXPECT_EQ(r.finished[0].tokens, (std::vector<int32_t>{50, 3}));
  outputs.add(0, 6, 60, r);
  EXPECT_EQ(r.finished.size(), 1u);
  EXPECT_EQ(r.first.size(), 1u);
}

TEST(Outputs, LengthEndsAndForcedLengthHidesEnds) {
  Outputs outputs(1, {2});
  StepPlan p = admit(0, 4);
  p.admitted[0].forced_length = 3;
  outputs.admit(p.admitted);
  StepResult r;
  for (int i = 0; i < 3; ++i) outputs.add(0, 4 + i, 2, r);
  ASSERT_EQ(r.finished.size(), 1u);
  EXPECT_FALSE(r.finished[0].by_eos);
  EXPECT_EQ(r.finished[0].tokens.size(), 3u);
}

TEST(Outputs, ASlotsNextOwnerStartsAnew) {
  Outputs outputs(1, {2});
  StepPlan first = admit(0, 4), second = admit(0, 2);
  second.admitted[0].id = 7;
  outputs.admit(first.admitted);
  StepResult r;
  outputs.add(0, 4, 50, r);
  outputs.admit(second.admitted);
  outputs.add(0, 2, 51, r);
  ASSERT_EQ(r.first.size(), 2u);
  EXPECT_EQ(r.first[1].id, 7u);
}

TEST(Outputs, ATokenThatIsNoTokenIsAnError) {
  Outputs outputs(1, {2});
  StepPlan p = admit(0, 4);
  outputs.admit(p.admitted);
  StepResult r;
  EXPECT_THROW(outputs.add(0, 4, -1, r), Error);
}

}  // namespace
}  // namespace drover
