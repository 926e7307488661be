// Making a node of the autograd graph.
#pragma once

#include <torch/csrc/autograd/function.h>

#include <utility>

namespace sparse_attn {

using NodePtr = decltype(torch::autograd::Edge::function);

/// From torch 2.13 on, which has node.h, a node counts its references itself; in 2.11 they are
/// counted beside it.
template <class Derived, class... Arguments>
std::pair<Derived*, NodePtr> make_node(Arguments&&... arguments) {
#if __has_include(<torch/csrc/autograd/node.h>)
  auto node = c10::make_intrusive<Derived>(std::forward<Arguments>(arguments)...);
  return {node.get(), node};
#else
  auto* node = new Derived(std::forward<Arguments>(arguments)...);
  return {node, NodePtr(node, torch::autograd::deleteNode)};
#endif
}

}  // namespace sparse_attn
