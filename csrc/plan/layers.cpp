#include "plan/layers.h"

#include <iterator>
#include <utility>

namespace sparse_attn {
namespace {

std::int64_t step_of(const Term& term) {
  std::int64_t step = 1;
  for (const PrimitivePtr& p : term) step = std::max(step, p->step());
  return step;
}

TokenList united(const TokenList& a, const TokenList& b) {
  TokenList both;
  std::set_union(a.begin(), a.end(), b.begin(), b.end(), std::back_inserter(both));
  return both;
}

bool equal(const Term& a, const Term& b) {
  return a.size() == b.size() &&
         std::equal(a.begin(), a.end(), b.begin(), [](const auto& p, const auto& q) {
           return p->includes(*q) && q->includes(*p);
         });
}

}  // namespace

Parts::Parts(const Terms& terms) {
  for (const Term& term : terms) add(term);
}

void Parts::add(const Term& term) {
  const auto found = [&](auto has) { return std::find_if(term.begin(), term.end(), has); };
  if (const auto p = found([](const auto& q) { return q->position_list() != nullptr; });
      p != term.end()) {
    positions = united(positions, *(*p)->position_list());  // no other row is in this term
  } else if (found([](const auto& q) { return q->lists() != nullptr; }) != term.end()) {
    of_lists.push_back(term);
  } else if (const auto k = found([](const auto& q) { return q->key_list() != nullptr; });
             k != term.end()) {
    Term rest = term;
    rest.erase(rest.begin() + (k - term.begin()));
    add_gather({*k, std::move(rest)});
  } else {
    ordered[step_of(term)].push_back(term);
  }
}

void Parts::add_gather(Gather gather) {
  for (Gather& present : gathers) {
    if (!equal(present.rest, gather.rest)) continue;
    present.keys =
        std::make_shared<GlobalKeys>(united(*present.keys->key_list(), *gather.keys->key_list()));
    return;
  }
  gathers.push_back(std::move(gather));
}

Terms Parts::layers() const {
  Terms all;
  for (const Gather& gather : gathers) {
    all.push_back(gather.rest);
    all.back().push_back(gather.keys);
  }
  for (const auto& [step, terms] : ordered)
    all.push_back(terms.size() == 1 ? terms[0] : Term{std::make_shared<UnionOf>(terms)});
  all.insert(all.end(), of_lists.begin(), of_lists.end());
  return all;
}

}  // namespace sparse_attn
