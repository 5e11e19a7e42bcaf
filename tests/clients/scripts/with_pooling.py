"""Cohere's client (both versions of its rerank), LangChain's, LlamaIndex's and litellm's embedding and rerank classes."""
import json
import os

import cohere
import litellm
from langchain_cohere import CohereRerank
from langchain_core.documents import Document
from langchain_openai import OpenAIEmbeddings
from llama_index.core.schema import NodeWithScore, TextNode
from llama_index.embeddings.openai_like import OpenAILikeEmbedding
from llama_index.postprocessor.cohere_rerank import CohereRerank as LlamaRerank

URL, MODEL = os.environ["QUARTET_URL"], os.environ["QUARTET_MODEL"]
QUERY = "What is the capital of France?"
DOCUMENTS = ["The capital of Brazil is Brasilia.", "The capital of France is Paris.", "Horses and cows are both animals"]


def order(results: list) -> list:
    return [[r.index, round(r.relevance_score, 4)] for r in results]


first = cohere.Client(api_key="none", base_url=URL).rerank(model=MODEL, query=QUERY, documents=DOCUMENTS, return_documents=True)
second = cohere.ClientV2(api_key="none", base_url=URL).rerank(model=MODEL, query=QUERY, documents=DOCUMENTS, top_n=2)

chain = OpenAIEmbeddings(model=MODEL, base_url=URL + "/v1", api_key="none", check_embedding_ctx_length=False)
compressed = CohereRerank(client=cohere.ClientV2(api_key="none", base_url=URL), model=MODEL, top_n=2).compress_documents(
    [Document(page_content=text) for text in DOCUMENTS], QUERY)

index = OpenAILikeEmbedding(model_name=MODEL, api_base=URL + "/v1", api_key="none")
ranker = LlamaRerank(model=MODEL, api_key="none", base_url=URL, top_n=2)
nodes = ranker.postprocess_nodes([NodeWithScore(node=TextNode(text=text), score=0.0) for text in DOCUMENTS], query_str=QUERY)

print(json.dumps({
    "cohere": [order(first.results), order(second.results)], "cohere_text": first.results[0].document.text,
    "langchain": [chain.embed_query(QUERY), chain.embed_documents([QUERY])[0]],
    "langchain_rerank": [[d.page_content, round(d.metadata["relevance_score"], 4)] for d in compressed],
    "llama_index": [index.get_text_embedding(QUERY), index.get_text_embedding_batch([QUERY])[0]],
    "llama_index_rerank": [[n.node.get_content(), round(n.score, 4)] for n in nodes],
    "litellm": [
        litellm.embedding(model=f"{provider}/{MODEL}", input=[QUERY], api_base=URL + "/v1", api_key="none").data[0]["embedding"]
        for provider in ("openai", "hosted_vllm")],
    "litellm_rerank": [
        [r["index"], round(r["relevance_score"], 4)] for r in litellm.rerank(
            model=f"hosted_vllm/{MODEL}", query=QUERY, documents=DOCUMENTS, api_base=URL, api_key="none").results]}))
